"""Everything that needs a GPU, in pieces that keep their results, and one Markdown file of it all.

    make gpu                                   # all pieces, then gpu-report/report.md
    python benchmarks/gpu.py speed --minutes 9 # one piece; run again to go on where it stopped

A job that is done is not repeated; one that failed or ran out of time is. `--small` replaces every
job by the same one on the CPU with the least of everything, to see that it runs at all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "triton", "torchvision", "lightning", "torchmetrics", "timm",
    "segmentation-models-pytorch", "albumentations", "transformers", "mmsegmentation",
)  # fmt: skip


LEAST_SECONDS = 10.0
"""With less time left, no job is begun."""


@dataclass(frozen=True)
class Job:
    """A command, and the same at its smallest for a machine without GPU."""

    name: str
    command: str
    small: str


def tests(name: str, arguments: str) -> Job:
    """Tests with the GPU visible; small: that they are found."""
    command = f"-m pytest -q -p no:cacheprovider {arguments}"
    return Job(name, command, f"{command} --collect-only")


def table(name: str, script: str, arguments: str, small: str) -> Job:
    """A benchmark's table."""
    path = f"benchmarks/{script}.py"
    return Job(name, f"{path} --device cuda {arguments}", f"{path} --device cpu {small}")


def steps(network: str, precision: str, batch: int) -> Job:
    """Training steps beside MMSegmentation's and transformers'."""
    chosen = f"--networks {network} --precision {precision}"
    return table(
        f"training step, {network}, {precision}",
        "training_step",
        f"{chosen} --batch {batch} --repeats 20 --hugging-face",
        f"{chosen} --batch 2 --crop 64 --repeats 1",
    )


NETWORKS = {
    "UPerNet-Swin-T": 4,
    "UPerNet-ConvNeXt-T": 4,
    "PSPNet-R101-D8": 4,
    "DeepLabV3+-R101-D8": 4,
}
"""Images per GPU of the recipes."""

PIECES: dict[str, list[Job]] = {
    "tests": [
        tests("tests marked gpu", "-m gpu tests callbacks/tests"),
        tests("operators", "-m 'not slow and not gpu' tests/operators"),
        tests("models", "-m 'not slow and not gpu' tests/models"),
        tests("training", "-m 'not slow and not gpu' tests --ignore=tests/operators"
              " --ignore=tests/models --ignore=tests/data --ignore=tests/cli"),
        tests("callback", "-m 'not slow and not gpu' callbacks/tests"),
    ],
    "speed": [
        *(steps(n, p, b) for n, b in NETWORKS.items() for p in ("bf16-mixed", "32-true")),
        table("other people's networks", "acceleration", "--crop 512 --batch 8 --repeats 20",
              "--crop 64 --batch 1 --repeats 1 --networks 'smp Segformer, MiT-B0'"),
        table("calibration and forms of equalization", "equalization", "--size 512",
              "--size 64 --batches 2 --repeats 2"),
        table("decoders", "decoders", "--size 1024 2048 --repeats 20", "--count"),
    ],
    "fusion": [
        table("fusion, batch 4", "fusion", "--batch 4 --repeats 20",
              "--crop 64 --batch 1 --repeats 1 --only operator"),
        table("loss and argmax, batch 8", "fusion", "--batch 8 --repeats 20 --only classes",
              "--crop 64 --batch 1 --repeats 1 --only classes"),
        table("the same numbers in every mode", "modes", "", "--networks FCNHead"),
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a job printed, and how it ended (None: out of time)."""

    job: str
    command: str
    code: int | None
    seconds: float
    output: str


def run(job: Job, small: bool, limit: float) -> Result:
    """Run a job for at most `limit` seconds."""
    command = job.small if small else job.command
    # Tests import the benchmarks; on a machine without installation nothing else is on the path.
    paths = [ROOT, ROOT / "callbacks", os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *shlex.split(command)], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        code = None
    return Result(job.name, command, code, time.perf_counter() - start, output)


def path_of(out: Path, piece: str, job: Job) -> Path:
    """Where a job's result is kept."""
    name = "".join(letter if letter.isalnum() else "_" for letter in job.name)
    return out / piece / f"{name}.json"


def run_piece(piece: str, out: Path, small: bool, minutes: float) -> None:
    """Run what is not done, as far as time goes."""
    end = time.monotonic() + 60 * minutes
    for job in PIECES[piece]:
        path = path_of(out, piece, job)
        if path.exists() and json.loads(path.read_text())["code"] == 0:
            continue
        left = end - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"{piece}: time is up; run this again to go on with {job.name!r}")
            return
        print(f"{piece}: {job.name} ...", flush=True)
        result = run(job, small, left)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(result), indent=1))
        print(f"{piece}: {job.name}: {ending(result)}", flush=True)


def ending(result: Result) -> str:
    """How a job ended, in words."""
    if result.code is None:
        return f"out of time after {result.seconds:.0f} s"
    return f"{'done' if result.code == 0 else f'failed ({result.code})'} in {result.seconds:.0f} s"


def machine() -> Iterator[str]:
    """Card, driver and versions."""
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        yield f"- card: {card.name}, {card.total_memory / 2**30:.0f} GiB"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            said = "unknown"
        yield f"- driver {said.splitlines()[0].strip()}, CUDA {torch.version.cuda}"
        yield f"- cuDNN {torch.backends.cudnn.version()}"
    else:
        yield "- no GPU: a trial run on the CPU, whose figures mean nothing"
    yield f"- Python {platform.python_version()}, {os.cpu_count()} CPU cores"
    yield f"- {', '.join(f'{name} {version_of(name)}' for name in PACKAGES)}"


def version_of(name: str) -> str:
    """Version of a distribution."""
    try:
        return str(metadata.version(name))  # type: ignore[no-untyped-call]
    except metadata.PackageNotFoundError:
        return "is absent"


def report(out: Path) -> str:
    """All results so far as Markdown."""
    lines = ["# seglab on a GPU", "", *machine()]
    for piece, jobs in PIECES.items():
        lines += ["", f"## {piece.capitalize()}"]
        for job in jobs:
            path = path_of(out, piece, job)
            lines += ["", f"### {job.name}", ""]
            if not path.exists():
                lines.append("Not run yet.")
                continue
            result = Result(**json.loads(path.read_text()))
            lines += [f"`python {result.command}`: {ending(result)}", "", *shown(result)]
    return "\n".join(lines) + "\n"


def shown(result: Result) -> list[str]:
    """Tables as they are; the end of anything else."""
    lines = result.output.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    if rows and result.code == 0:
        return rows
    return ["```", *lines[-15:], "```"]


def main() -> None:
    """Run pieces, write the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "pieces", nargs="*", metavar="piece", help=f"of {', '.join(PIECES)}; default all"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-report")
    parser.add_argument("--minutes", type=float, default=9.5, help="for each piece")
    parser.add_argument("--small", action="store_true", help="on the CPU, to see that it runs")
    options = parser.parse_args()
    if unknown := set(options.pieces) - set(PIECES):
        parser.error(f"unknown piece {', '.join(sorted(unknown))}: there are {', '.join(PIECES)}")
    if not options.small and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --small tries everything on the CPU")
    for piece in options.pieces or PIECES:
        run_piece(piece, options.out, options.small, options.minutes)
    path = options.out / "report.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report(options.out))
    print(path)


if __name__ == "__main__":
    main()
