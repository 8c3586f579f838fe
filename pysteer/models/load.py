"""A model by name: one of the zoo, a folder in any of the formats known here, or a name of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pysteer import files
from pysteer.errors import InputError


def load_model(name: str, **options: Any) -> Any:
    """Load what `pysteer.steer` and `pysteer.fit` take.

    Args:
        name: a generator of `pysteer.zoo`, "smollm2", a folder of pysteer (Infinity), diffusers or transformers, or a
            name of the hub, whose `model_index.json` or `config.json` says what it is.
        options: passed on to `from_pretrained`, for example `dtype` or `revision`.

    Returns:
        An `InfinityPipeline`, an `ImageGenerator` or a `LanguageModel`.

    Raises:
        InputError: there is no such model, or it is of no known kind.
    """
    from pysteer import zoo

    folder = Path(name)
    if not folder.is_dir():
        if name in zoo.available()["generators"]:
            return zoo.load(name)
        if name == "smollm2":
            from pysteer.models.language import smollm2

            return smollm2()
    kind = _kind_of_folder(folder) if folder.is_dir() else _kind_on_hub(name, options)
    if kind == "infinity":
        from pysteer.models.infinity.pipeline import InfinityPipeline

        return InfinityPipeline.from_pretrained(folder, **options)
    if kind == "diffusers":
        from pysteer.models.diffusion import ImageGenerator

        return ImageGenerator.from_pretrained(name, **options)
    from pysteer.models.language import LanguageModel

    return LanguageModel.from_pretrained(name, **options)


_MARKS = {"pipeline.json": "infinity", "model_index.json": "diffusers", "config.json": "transformers"}


def _kind_of_folder(folder: Path) -> str:
    for mark, kind in _MARKS.items():
        if (folder / mark).is_file():
            found = files.read_json(folder / mark, "configuration") if kind == "transformers" else {}
            if not isinstance(found, dict):
                raise InputError("configuration of a model", value=type(found).__name__, allowed="a JSON object")
            if "_diffusers_version" in found:
                raise InputError("model", value=str(folder), fix="give the folder of its whole pipeline")
            return kind
    raise InputError("folder of a model", value=str(folder), allowed=f"one that holds {', '.join(_MARKS)}")


def _kind_on_hub(name: str, options: dict[str, Any]) -> str:
    """By the file that the repository has; from the cache where there is no network."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    known: dict[str, Any] = {key: options[key] for key in ("revision", "token", "cache_dir") if key in options}
    for mark, kind in list(_MARKS.items())[1:]:
        try:
            hf_hub_download(name, mark, **known)
        except HFValidationError as error:
            raise _unknown(name) from error
        except LocalEntryNotFoundError:
            known["local_files_only"] = True  # there is no network: only the cache is left, without trying again
            continue
        except (OSError, EntryNotFoundError):
            continue
        return kind
    raise _unknown(name)


def _unknown(name: str) -> InputError:
    from pysteer import zoo

    allowed = f"{', '.join(zoo.available()['generators'])}, smollm2, a folder, or a name of the hub"
    return InputError("model", value=name, allowed=allowed, fix="check the name, the path and the network")
