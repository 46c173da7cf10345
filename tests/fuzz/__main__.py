"""Search for inputs that a reader cannot take, guided by coverage (`make fuzz`), or read one input again.

    python -m tests.fuzz                        list the targets
    python -m tests.fuzz TARGET --seconds 60    search; needs the package atheris
    python -m tests.fuzz TARGET FILE            read an input that an earlier search has found

The search begins with the valid inputs of the target, and keeps every input that reaches new
code in build/fuzz/TARGET/. An input that fails is written to build/fuzz/TARGET-crash-*, and its path is printed.
"""

import argparse
import sys
from pathlib import Path
from random import Random

FOLDER = Path("build/fuzz")
MAX_LENGTH = 64 * 1024  # bytes of an input
SLOWNESS = 10.0  # of Python while coverage is measured
MAX_SECONDS = 60  # for one input, against endless loops; the oracle judges shorter times
MAX_MEGABYTES = 3000  # of the process, against memory that Python does not know of
READERS = (  # the modules that the search watches; torch compiles the other modules of `models`
    "service.codec", "service.anomaly", "service.endpoints", "models.inspection", "models.archive_check",
    "models.code_check", "models.onnx_check", "models.pickle_check", "models.manifest", "models.columns",
    "models.timestamps",
)  # fmt: skip


def search(name: str, seconds: int) -> None:
    """Search for `seconds` seconds, then end the process. The status is 0 if no input failed."""
    import atheris

    with atheris.instrument_imports(include=list(READERS)):
        from tests.fuzz.oracle import check
        from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(seed)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.3:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, random)[:max_size]

    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={MAX_SECONDS}",
        f"-rss_limit_mb={MAX_MEGABYTES}",
        f"-max_len={MAX_LENGTH}",
        f"-artifact_prefix={FOLDER / name}-",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup(
        [sys.argv[0], *arguments, str(corpus)], lambda data: check(target, data, SLOWNESS), custom_mutator=mutate
    )
    atheris.Fuzz()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description="Search for inputs that readers cannot take."
    )
    parser.add_argument("target", nargs="?", help="name of a target; without it, the targets are listed")
    parser.add_argument("file", nargs="?", type=Path, help="read this input once instead of searching")
    parser.add_argument("--seconds", type=int, default=60, help="how long to search")
    options = parser.parse_args()
    if options.target and not options.file:
        search(options.target, options.seconds)
        return
    from tests.fuzz.oracle import check
    from tests.fuzz.targets import TARGETS

    if not options.target:
        print("\n".join(TARGETS))
        return
    check(TARGETS[options.target], options.file.read_bytes())
    print("the input is read or refused within the limits")


if __name__ == "__main__":
    main()
