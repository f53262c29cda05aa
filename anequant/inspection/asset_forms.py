"""What the constants and functions of an asset are: told by Apple's parser, or by anequant's own record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anequant.errors import InputError, UnsupportedError
from anequant.targets.coreai.bundle import DESIGN, read_design
from anequant.targets.coreai.design import Design
from anequant.targets.coreai.listed_weights import Weight, list_designed_weights, list_forms, list_weights
from anequant.targets.coreai.listing import Form, ListedFunction, read_listing


@dataclass(frozen=True)
class Known:
    """What could be read of an asset: by the parser, from the record, or neither, and why not."""

    functions: Sequence[ListedFunction] | None
    design: Design | None
    reason: str

    @property
    def forms(self) -> dict[str, Form] | None:
        if self.functions is not None:
            return list_forms(self.functions)
        if self.design is not None:
            return {name: Form(item.dtype, item.shape) for name, item in self.design.constants.items()}
        return None

    @property
    def weights(self) -> list[Weight] | None:
        if self.functions is not None:
            return list_weights(self.functions)
        return None if self.design is None else list_designed_weights(self.design.constants)

    @property
    def missing(self) -> dict[str, str]:
        """What is not known, and why."""
        if self.functions is not None:
            return {}
        what = "functions, widths and weights" if self.design is None else "operations"
        return {what: self.reason}


def read_known(asset: Path, bundle: Path | None) -> Known:
    """Read what can be read. Raises InputError for a record that is damaged."""
    design = read_design(bundle)[0] if bundle is not None and (bundle / DESIGN).is_file() else None
    try:
        return Known(read_listing(asset), design, "")
    except (UnsupportedError, InputError) as error:
        return Known(None, design, f"{error.what}; {error.remedy}" if error.remedy else error.what)
