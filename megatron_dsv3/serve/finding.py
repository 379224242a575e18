"""What the check of a directory finds: where, what is wrong, and what to do about it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a directory that whoever serves it should know."""

    where: str
    """A file, a key or a tensor."""
    what: str
    way_out: str
    blocks: bool = True
    """Whether the directory must not be served like this; False: it runs, perhaps not as wished."""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.way_out}"
