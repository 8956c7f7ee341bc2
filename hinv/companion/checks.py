"""Claims and how they are kept: every statement a notebook makes is measured, compared with a bound, printed and written to JSON.

A printed line names the bound and never the measured digits, so that nbval can compare it on another machine; the
digits go to results/NN.json.
"""

import json
import math
import operator
import os
import platform
import subprocess
import tempfile
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hinv.errors import warn
from hinv.shapes import Float


def _root() -> Path:
    """The project's folder where hinv runs from a checkout; the working folder where it was installed from a wheel."""
    checkout = Path(__file__).resolve().parents[2]
    return checkout if (checkout / "notebooks").is_dir() and (checkout / "pyproject.toml").exists() else Path.cwd()


ROOT = _root()
RELATIONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


def output(kind: str) -> Path:
    """Folder for "results" or "figures": below HINV_OUTPUT if set (the tests do), else below the project."""
    folder = Path(os.environ.get("HINV_OUTPUT", ROOT)) / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def relative_error(value: Float[Tensor, "..."], reference: Float[Tensor, "..."]) -> float:
    """||value - reference|| / ||reference|| (Frobenius); the absolute error when the reference is zero."""
    if value.shape != reference.shape:
        raise ValueError(f"shapes differ: {tuple(value.shape)} and {tuple(reference.shape)}")
    error, scale = torch.linalg.vector_norm(value - reference).item(), torch.linalg.vector_norm(reference).item()
    return error / scale if scale > 0 else error


def agree(value: Float[Tensor, "..."], reference: Float[Tensor, "..."], tolerance: float, what: str) -> None:
    """Assert that two tensors agree to a relative tolerance and print a line without machine-dependent digits."""
    error = relative_error(value, reference)
    if not error <= tolerance:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {tolerance:.0e}")
    print(f"ok: {what}, relative error below {tolerance:.0e}")


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table."""
    lines = [list(map(str, head)), ["---"] * len(head), *(list(map(str, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary file beside `path`, then rename: a reader never finds half a file."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, text=True)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def alone(path: Path, doing: str) -> Generator[bool, None, None]:
    """One process at a time: a second one waits, and says so. True for one that had to wait. The lock goes with the process, however that ends."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
        waited = False
    except Timeout:
        warn(f"another process is {doing} ({path}): waiting until it is done")
        lock.acquire()
        waited = True
    try:
        yield waited
    finally:
        lock.release()


class Claims:
    """The claims of one notebook.

    Args:
        number: the notebook's number, "03"; results go to results/03.json.
        title: what the notebook shows.
        seed, profile, dtype, device, data: how it was run; `data` is what was really loaded.
    """

    def __init__(
        self,
        number: str,
        title: str,
        seed: int,
        profile: str,
        dtype: str = "float64",
        device: str = "cpu",
        data: str = "digits",
    ):
        self.record: dict[str, Any] = {
            "notebook": number,
            "title": title,
            "seed": seed,
            "profile": profile,
            "dtype": dtype,
            "device": device,
            "data": data,
            "commit": commit(),
            "versions": {"python": platform.python_version()} | {p: version(p) for p in ("torch", "numpy", "scipy")},
            "machine": machine(),
            "claims": [],
            "values": {},
        }

    def check(self, statement: str, measured: float, relation: str, bound: float, equation: str = "") -> None:
        """Record `measured relation bound` ("<=", ">=" or "==") and print the outcome. A failure is raised by `write`, after all are recorded."""
        passed = bool(math.isfinite(measured) and RELATIONS[relation](measured, bound))
        self.record["claims"].append(
            {
                "statement": statement,
                "equation": equation,
                "measured": measured,
                "relation": relation,
                "bound": bound,
                "passed": passed,
            }
        )
        shown = f"{bound:g}"
        print(
            f"{'ok' if passed else 'FAILED'}: {statement} ({relation} {shown})"
            + ("" if passed else f", measured {measured:.3e}")
        )

    def note(self, **values: Any) -> None:
        """Record numbers the prose needs, without a bound."""
        self.record["values"].update(values)

    def write(self) -> None:
        """Write results/NN.json.

        Raises:
            AssertionError: naming every claim that failed (the file is written all the same).
        """
        path = output("results") / f"{self.record['notebook']}.json"
        write_atomically(path, json.dumps(self.record, indent=1) + "\n")
        failed = [c["statement"] for c in self.record["claims"] if not c["passed"]]
        if failed:
            raise AssertionError(
                f"{len(failed)} claims of notebook {self.record['notebook']} failed: {'; '.join(failed)}"
            )
        print(f"ok: {len(self.record['claims'])} claims of notebook {self.record['notebook']} hold")


def read(number: str) -> dict[str, Any]:
    """results/NN.json.

    Raises:
        FileNotFoundError: with the command that makes it.
    """
    path = output("results") / f"{number}.json"
    if not path.exists():
        raise FileNotFoundError(f"no results of notebook {number}: run it first, or 'make reproduce' for all")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise FileNotFoundError(
            f"{path} is damaged ({error}): run notebook {number} again, or 'make reproduce'"
        ) from error


def machine() -> dict[str, Any]:
    """Processor, cores and the threads torch uses: what speed and last digits depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    processor = model or platform.processor() or platform.machine()
    return {"processor": processor, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def commit() -> str:
    """The git commit of the project, with "+" if files differ from it, or "unknown" outside git."""
    try:
        run: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **run).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if dirty else "")
