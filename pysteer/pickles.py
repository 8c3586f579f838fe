"""Looking through a pickle before it is loaded: what it would call or reserve is told from its opcodes."""

import pickletools
import re
import zipfile
from pathlib import Path

from pysteer.errors import InputError

_STORAGES = "Float|Double|Half|BFloat16|Long|Int|Short|Char|Byte|Bool"
_HARMLESS = re.compile(
    rf"collections OrderedDict|torch\._utils _rebuild_(tensor_v2|parameter)|torch ({_STORAGES})Storage"
)
_STRANGE = ("STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID")


def look_through(program: bytes, where: str) -> None:
    """Raise an InputError if a pickle names more than tensors and their storages.

    Even with `weights_only=True` a pickle may call what reserves any amount of memory, such as `bytearray`.
    """
    for opcode, argument, _ in pickletools.genops(program):
        strange = opcode.name in _STRANGE
        if strange or (opcode.name == "GLOBAL" and not _HARMLESS.fullmatch(str(argument))):
            found = opcode.name if strange else str(argument).replace(" ", ".")
            raise InputError(
                f"{where} holds more than tensors",
                value=found,
                allowed="tensors, numbers, text, lists and dictionaries, read with weights_only=True",
                fix="do not trust it",
            )


def programs_of(path: Path) -> list[bytes]:
    """The pickles in a file of `torch.save` in its zip format."""
    with zipfile.ZipFile(path) as archive:
        return [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
