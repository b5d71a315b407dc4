"""Saving, loading and sharing of a processor: its tokenizer's files and one file with its settings.

The folder is that of transformers' processors, so `AutoProcessor.from_pretrained(folder)` finds the class once it is
registered, and `push_to_hub` is transformers' own. Not their `ProcessorMixin`: its ``__call__`` and chat templates know
neither of query blocks nor of a second view of the picture.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, TypeVar

from transformers import AutoTokenizer
from transformers.utils import PushToHubMixin

from instructsam.processing.hub import find_folder

CONFIG_NAME = "processor_config.json"
FILES = (CONFIG_NAME, "tokenizer*", "vocab.json", "merges.txt", "*_tokens*.json", "*.jinja", "chat_template.json")
"""What is downloaded of a hub name: the processor's own files, no weights."""

Self = TypeVar("Self", bound="PretrainedProcessor")


class PretrainedProcessor(PushToHubMixin):
    """A processor made of a tokenizer and of settings that JSON can hold.

    Subclasses take ``tokenizer`` as their first argument, and set ``tokenizer`` and ``_settings`` (all other arguments
    by name).
    """

    tokenizer: Any
    _settings: dict[str, Any]

    def save_pretrained(
        self,
        folder: str | Path,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        max_shard_size: int | str | None = None,
        **push_options: Any,
    ) -> None:
        """Write the tokenizer and the settings into a folder.

        Args:
            folder: created if need be; a model's files may lie in it too.
            push_to_hub: upload the same files as well.
            repo_id: with push_to_hub, ORG/NAME on the hub (default: the folder's name, in the user's own space).
            max_shard_size: of models; `push_to_hub` hands it to everything that it saves. There are no shards here.
            push_options: those of `push_to_hub`: ``private``, ``token``, ``revision``, ``commit_message``, ….

        Raises:
            TypeError: options of `push_to_hub` without it, or unknown ones.
        """
        if not push_to_hub and (repo_id is not None or push_options):
            names = [*(["repo_id"] if repo_id is not None else []), *push_options]
            raise TypeError(f"save_pretrained: {', '.join(names)} without push_to_hub=True")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(str(folder))
        content = {"processor_class": type(self).__name__, **self._settings}
        (folder / CONFIG_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(repo_id or folder.resolve().name, **push_options)

    @classmethod
    def is_saved_in(cls, folder: str | Path) -> bool:
        """Whether a folder holds a processor of this class (others use a file of the same name)."""
        try:
            _read_settings(Path(folder), cls.__name__)
        except ValueError:
            return False
        return True

    @classmethod
    def from_pretrained(
        cls: type[Self],
        path_or_name: str | Path,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        **overrides: Any,
    ) -> Self:
        """Read what `save_pretrained` wrote, from a folder or from the hub.

        Args:
            path_or_name: a folder, or ORG/NAME on the hub.
            revision, token, cache_dir, local_files_only, force_download: of a download, as everywhere in transformers.
            overrides: arguments of this class (not the tokenizer) that go before the stored ones.
                ``trust_remote_code``, which `AutoProcessor` passes on, changes nothing: no code of a checkpoint is run.

        Raises:
            ValueError: no such folder or hub name, or no processor of this kind in it.
            TypeError: an argument that this class does not have.
        """
        for handed_on in ("trust_remote_code", "_from_auto"):
            overrides.pop(handed_on, None)
        folder = find_folder(
            path_or_name,
            "InstructSAM processor",
            FILES,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            force_download=force_download,
        )
        settings = _read_settings(folder, cls.__name__)
        known = set(inspect.signature(cls.__init__).parameters) - {"self", "tokenizer"}
        if unknown := sorted(set(overrides) - known):
            raise TypeError(f"{cls.__name__}.from_pretrained: unknown argument {', '.join(unknown)}")
        if unknown := sorted(set(settings) - known):
            raise ValueError(f"{folder / CONFIG_NAME}: unknown setting {', '.join(unknown)}")
        if lacking := sorted({"num_queries", "mask_size"} - set(settings)):
            raise ValueError(f"{folder / CONFIG_NAME}: no {', '.join(lacking)} in it")
        return cls(read_tokenizer(folder), **{**settings, **overrides})


def read_tokenizer(folder: str | Path) -> Any:
    """The tokenizer in a local folder. Raises ValueError where there is none, or a broken one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, so no tokenizer")
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ValueError(f"{folder}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library knows no other class
        raise ValueError(f"{folder}: its tokenizer cannot be read ({type(error).__name__}: {error})") from error


def _read_settings(folder: Path, class_name: str) -> dict[str, Any]:
    """The stored settings without the class name. Raises ValueError where they are not this class's."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG_NAME} there, so this is not an InstructSAM checkpoint")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    found = settings.pop("processor_class", None) if isinstance(settings, dict) else None
    if found != class_name:
        raise ValueError(f"{path}: is about a processor of class {found!r}, so this is not an InstructSAM checkpoint")
    return settings
