"""Build the sdist, from it the wheel; look into it, install it in a clean environment, and run a short demo elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST, CLEAN = ROOT / "dist", ROOT / "build" / "clean"
# What an installed package needs besides modules.
NEEDED = (
    *(
        "py.typed",
        "__init__.pyi",
        "recipes/qwen3-0.6b-from-8b.yaml",
        "recipes/paper/gpt2.yaml",
        "recipes/accelerate/ddp.yaml",
    ),
    *("assets/world/README.md", "assets/world/student/model.safetensors", "assets/world/teacher/model.safetensors"),
    *("assets/demo.yaml", "assets/report/page.html", "assets/scale/models.yaml"),
)


def run(*command: str | Path, **options: str | Path) -> None:
    print("$", *(str(each).replace(f"{ROOT}/", "") for each in command), flush=True)
    # A checkout on the path would stand in for what was not packed. And with no bytecode kept each of the demo's processes would
    # compile torch and transformers for itself, which takes it twice as long as to import them.
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    subprocess.run([str(each) for each in command], check=True, env=environment, **options)  # type: ignore[call-overload]


def look_into(wheel: Path) -> None:
    """Stop where the wheel lacks a file, or its readme has a link that leads nowhere from an index."""
    with zipfile.ZipFile(wheel) as packed:
        names = set(packed.namelist())
        (metadata,) = (packed.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    missing = [name for name in NEEDED if f"switchkd/{name}" not in names]
    relative = re.findall(r"\]\((?!https?://|#)[^)]*\)", metadata)
    licenses = [name for name in names if ".dist-info/licenses/" in name]
    if missing or relative or len(licenses) < 2:
        sys.exit(f"{wheel.name}: missing {missing}, relative links {relative}, licenses {licenses}")
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB, all links absolute")


def main() -> None:
    start = time.monotonic()
    for folder in (DIST, CLEAN):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--quiet", "--sdist", "--outdir", DIST, cwd=ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    venv.create(CLEAN, with_pip=True, symlinks=True)
    pip = (CLEAN / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check")
    # An install of the sdist is this and an install of the wheel, so what the sdist lacks the wheel lacks too.
    run(*pip, "wheel", "--no-deps", "--wheel-dir", DIST, sdist)
    (wheel,) = DIST.glob("*.whl")
    look_into(wheel)
    # Without bytecode of all that torch brings, of which a demo needs little.
    run(*pip, "install", "--no-compile", "-c", ROOT / "constraints.txt", wheel)
    print(f"built and installed after {time.monotonic() - start:.0f} s", flush=True)
    switchkd = CLEAN / "bin" / "switchkd"
    elsewhere = CLEAN / "elsewhere"
    elsewhere.mkdir()
    run(switchkd, "recipes", "accelerate/ddp", cwd=elsewhere)
    run(switchkd, "demo", "--steps", "2", "--limit", "12", "--output", "demo", cwd=elsewhere)
    print(f"wheel and sdist install and run, {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
