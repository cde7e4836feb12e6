"""A command line with a flag for every field of a dataclass of settings."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

Settings = TypeVar("Settings")


def parse_settings(
    program: str, description: str, kind: type[Settings], help_texts: Mapping[str, str], arguments: Sequence[str] | None
) -> Settings:
    """What `arguments` (None: the command line's) make of `kind`, whose defaults and checks hold."""
    parser = argparse.ArgumentParser(program, description=description)
    for field in fields(kind):
        flag, text, default = "--" + field.name.replace("_", "-"), help_texts[field.name], field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true", help=text)
        else:
            text += f" (default: {'none' if default == '' else default})"
            parser.add_argument(
                flag, type=type(default), default=default, help=text, metavar=type(default).__name__.upper()
            )
    try:
        return kind(**vars(parser.parse_args(arguments)))
    except ValueError as error:
        parser.error(str(error))
