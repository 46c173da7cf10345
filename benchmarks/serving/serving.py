"""Elbo against other model servers, over HTTP on the same two cores: `make bench-serve`.

All serve one file, a VAE 784-400-400-20-400-400-784 that Elbo published, on one torch thread a worker. The peers'
programs are in `peers/`; each says in its first lines how it is configured and why. One server runs at a time, started
afresh for its turn, so that no idle peer (Ray is never idle) takes a core from the one that is measured; in every round
all have a turn, so that the mood of the machine hits all. What is printed are medians over the rounds. Before anything
is measured, each server's answers must agree with those of the module in this process to 1e-4. Beside the servers
stands what an answer costs at least: the network, JSON and HTTP, each measured alone. Then, an open loop: requests at a
constant rate of 70 % and of 300 % of what the server can do.

Elbo runs as `python -m service`, with its access log; peers are spared theirs. `--quick` looks fast, `--smoke` only
looks whether it works. It needs Linux and, for figures worth quoting, wrk.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.data import where
from benchmarks.serving import tables
from benchmarks.serving.contestants import Contestant, contestants, versions
from benchmarks.serving.limits import rates
from benchmarks.serving.load import WRK
from benchmarks.serving.measures import COLUMNS, Results, Turn, open_loop, turn
from benchmarks.serving.processes import adopt_orphans
from benchmarks.serving.stage import Stage, stage_in
from benchmarks.serving.targets import lines as targets

CORES = 2
SMOKE = ("elbo", "plain", "echo")


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 2 s, an open loop of 10 s")
    parser.add_argument("--smoke", action="store_true", help="a few seconds of what needs no installation")
    parser.add_argument("--only", help="of elbo,plain,litserve,bentoml,ray,mlserver,triton,echo,echo-fastapi; commas")
    parser.add_argument("--rounds", type=int, help="turns of each server (5)")
    parser.add_argument("--seconds", type=float, help="of each measurement in a turn (5)")
    parser.add_argument("--open", default="elbo", metavar="NAMES", help="who faces the open loop (elbo); '' for none")
    parser.add_argument("--open-seconds", type=float, help="of each open loop (60)")
    parser.add_argument("--open-rows", type=int, default=1, choices=(1, 32), help="rows of its JSON requests (1)")
    parser.add_argument("--open-connections", type=int, default=2000, help="most that the open loop opens (2000)")
    parser.add_argument("--elbo-env", action="append", default=[], metavar="KEY=VALUE", help="a setting of Elbo's")
    options = parser.parse_args()
    rounds, seconds, open_seconds = (1, 1, 1) if options.smoke else (1, 2, 10) if options.quick else (5, 5, 60)
    options.rounds = options.rounds or rounds
    options.seconds = options.seconds or seconds
    options.open_seconds = options.open_seconds or open_seconds
    options.elbo = dict(setting.split("=", 1) for setting in options.elbo_env)
    return options


def compete(people: Mapping[str, Contestant], stage: Stage, options: argparse.Namespace) -> Results:
    """All turns of all rounds. Who fails is left out from there on, with the reason."""
    results = Results()
    for name, contestant in people.items():
        if reason := contestant.missing(name):
            results.failures[name] = reason
    for number in range(options.rounds):
        for name, contestant in people.items():
            if name in results.failures:
                continue
            print(f"round {number + 1} of {options.rounds}: {contestant.title}", file=sys.stderr, flush=True)
            try:
                turn(Turn(name, contestant, stage, options.elbo), results, options.seconds, thorough=not options.smoke)
            except RuntimeError as error:
                results.failures[name] = str(error)
        for rows in stage.rows:
            for work, rate in rates(stage, rows, options.seconds / 10).items():
                results.limits.setdefault((work, rows), []).append(rate)
    return results


def measure(people: Mapping[str, Contestant], stage: Stage, options: argparse.Namespace) -> Results:
    """Everything, printed as it becomes known."""
    present = {name: contestant for name, contestant in people.items() if not contestant.missing(name)}
    print(", ".join(filter(None, [where("torch", "uvicorn", "fastapi"), versions(present)])))
    print(f"\n`{' '.join(['python', 'benchmarks/serving/serving.py', *sys.argv[1:]])}`: {options.rounds} rounds of "
          f"{options.seconds:g} s on {len(os.sched_getaffinity(0))} cores; the closed loop by "
          f"{'wrk' if WRK else 'a client in Python, because wrk is not installed (apt-get install wrk)'}.")  # fmt: skip
    results = compete(people, stage, options)
    columns = COLUMNS[::2] if options.smoke else COLUMNS
    tables.closed_loop(people, columns, results)
    tables.anomaly(results)
    tables.limits(columns, results)
    outcomes = {}
    for name in filter(None, options.open.split(",")):
        if name in people and name not in results.failures:
            who = Turn(name, people[name], stage, options.elbo)
            try:
                how = options.open_rows, options.open_seconds, options.open_connections
                outcomes[people[name].title] = open_loop(who, *how)
            except RuntimeError as error:
                results.failures[name] = f"open loop: {error}"
    tables.open_loop(outcomes, options.open_rows, options.open_seconds)
    tables.targets(targets(results, outcomes))
    for name, reason in results.failures.items():
        print(f"\n{people[name].title} is left out: {reason}")
    return results


def main() -> None:
    """Stage it, run it, and fail if Elbo or one that needs no installation did."""
    options = parsed()
    adopt_orphans()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # children inherit it
    everybody = contestants(int(options.elbo.get("ELBO_WORKERS", os.environ.get("ELBO_WORKERS", "1"))))
    chosen = options.only.split(",") if options.only else SMOKE if options.smoke else list(everybody)
    unknown = set(chosen) - everybody.keys()
    if unknown:
        sys.exit(f"--only: expected names among {', '.join(everybody)}, got {', '.join(sorted(unknown))}")
    people = {name: everybody[name] for name in everybody if name in chosen}
    with tempfile.TemporaryDirectory(prefix="elbo-bench-") as folder:
        failures = measure(people, stage_in(Path(folder)), options).failures
    if any(people[name].package is None for name in failures):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; every server has been stopped")
