"""The `serve` commands' arguments; what they do is imported when one runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

serve = typer.Typer(help="Serve an exported model with vLLM.", no_args_is_help=True)


@serve.command("check")
def serve_check(
    hf_dir: Annotated[Path, typer.Argument(help="Exported model.", show_default=False)],
) -> None:
    """Tell whether vLLM can serve a directory; all that speaks against it, with what to do."""
    from megatron_dsv3.commands import serve as command

    command.check(hf_dir, Console())


ApiKey = Annotated[
    str | None,
    typer.Option(envvar="VLLM_API_KEY", help="What requests must carry.", show_default=False),
]


@serve.command("run", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_run(
    context: typer.Context,
    hf_dir: Annotated[Path, typer.Argument(help="Exported model.", show_default=False)],
    tp: Annotated[int, typer.Option(help="Devices that share each layer.")] = 1,
    pp: Annotated[int, typer.Option(help="Stages that share the layers.")] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    api_key: ApiKey = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; by default the directory's.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help="Tokens of prompt and answer; by default 32768, or what a shorter model takes.",
            show_default=False,
        ),
    ] = None,
    reasoning_parser: Annotated[str, typer.Option(help="vLLM's, or none.")] = "deepseek_r1",
    tool_parser: Annotated[
        str, typer.Option(help="vLLM's: deepseek_v3, deepseek_v31, or none.")
    ] = "deepseek_v3",
    speculative: Annotated[
        str | None, typer.Option(help="mtp, or vLLM's speculative config as JSON.")
    ] = None,
    python: Annotated[
        str, typer.Option(help="Python of the environment where vLLM is installed.")
    ] = sys.executable,
    nodes: Annotated[int, typer.Option(help="Machines; this command runs on each of them.")] = 1,
    node_rank: Annotated[int, typer.Option(help="Which of them this is; 0 answers requests.")] = 0,
    main_address: Annotated[str | None, typer.Option(help="Address of machine 0.")] = None,
    main_port: Annotated[int, typer.Option(help="Port of machine 0 for the others.")] = 29501,
    ready_seconds: Annotated[float, typer.Option(help="When to give up waiting.")] = 7200,
    check: Annotated[bool, typer.Option(help="Check the directory first.")] = True,
    smoke: Annotated[bool, typer.Option(help="Ask one question when ready.")] = True,
) -> None:
    """Start vLLM, wait until it answers, ask one question; flags not listed go to vLLM."""
    from megatron_dsv3.commands import serve as command
    from megatron_dsv3.serve.vllm import Server

    server = Server(
        hf_dir=hf_dir,
        python=python,
        host=host,
        port=port,
        name=name,
        tp_size=tp,
        pp_size=pp,
        max_model_len=max_model_len,
        reasoning_parser=None if reasoning_parser == "none" else reasoning_parser,
        tool_parser=None if tool_parser == "none" else tool_parser,
        speculative=speculative,
        num_nodes=nodes,
        node_rank=node_rank,
        main_address=main_address,
        main_port=main_port,
        extra=tuple(context.args),
    )
    command.run(
        server, Console(), api_key=api_key, checked=check, smoke=smoke, ready_seconds=ready_seconds
    )


@serve.command("smoke")
def serve_smoke(
    url: Annotated[str, typer.Argument(help="Of the server: http://HOST:PORT", show_default=False)],
    question: Annotated[str, typer.Option(help="What to ask.")] = "What is 17 * 24?",
    max_tokens: Annotated[int, typer.Option(help="Longest reasoning and answer.")] = 256,
    api_key: ApiKey = None,
) -> None:
    """Ask a server that runs one question; show reasoning, answer and tokens per second."""
    from megatron_dsv3.commands import serve as command

    command.smoke(url, Console(), question=question, max_tokens=max_tokens, api_key=api_key)
