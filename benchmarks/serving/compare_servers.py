"""Compare the speed of Elbo's server with that of other model servers, over HTTP and on two cores.

    python benchmarks/serving/compare_servers.py            # `make bench-serve` also installs the other servers
    python benchmarks/serving/compare_servers.py --quick    # one short round
    python benchmarks/serving/compare_servers.py --smoke    # only checks that the benchmark works

All servers serve the same artifact, published by Elbo: a VAE with the layer widths 784-400-400-20-400-400-784. Each
worker uses one torch thread. The programs of the other servers are in `peers/`. The docstring of each program explains
its configuration. Elbo runs as `python -m service` with its access log. The other servers run without access logs.

Only one server runs at a time, because some servers, such as Ray, use processor time even when idle. In each round,
every server is started anew and measured, so that changes in the machine's speed affect all servers alike. The tables
show medians over the rounds. Before each measurement, a response of the server is compared with the output of the
module in this process. Response and output must agree within 1e-4.

The benchmark measures closed loops with several numbers of connections and rows. For Elbo it also measures open loops:
requests at a constant rate of 70 % and of 300 % of the server's capacity. It also measures the minimum cost of a
response: the cost of the neural network, of JSON, and of HTTP, each alone.

The benchmark needs Linux. Install wrk if you want to quote the results. Without wrk, a slow Python client generates the
load.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.data import describe_machine
from benchmarks.serving import tables
from benchmarks.serving.load_generators import WRK
from benchmarks.serving.lower_bounds import measure_rates
from benchmarks.serving.measurement import COLUMNS, MeasuredServer, Results, measure_open_loop, measure_server
from benchmarks.serving.server_process import adopt_orphans
from benchmarks.serving.servers import ServerKind, package_versions, server_kinds
from benchmarks.serving.targets import evaluate_targets
from benchmarks.serving.workload import Workload, create_workload

CORES = 2
SMOKE_SERVERS = ("elbo", "plain", "echo")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of 2 s per measurement, an open loop of 10 s")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, with servers that need no installation")
    parser.add_argument(
        "--only",
        help="servers to measure, comma-separated: elbo,plain,litserve,bentoml,ray,mlserver,pytriton,granian,asyncio,"
        "echo,echo-fastapi",
    )
    parser.add_argument("--rounds", type=int, help="measurements per server (default 5)")
    parser.add_argument("--seconds", type=float, help="duration of each measurement (default 5)")
    parser.add_argument(
        "--open",
        default="elbo",
        metavar="NAMES",
        help="servers to measure in the open loop (default elbo; '' for none)",
    )
    parser.add_argument("--open-seconds", type=float, help="duration of each open loop (default 60)")
    parser.add_argument(
        "--open-rows", type=int, default=1, choices=(1, 32), help="rows per request in the open loop (default 1)"
    )
    parser.add_argument(
        "--open-connections", type=int, default=2000, help="most connections in the open loop (default 2000)"
    )
    parser.add_argument(
        "--elbo-env", action="append", default=[], metavar="KEY=VALUE", help="an environment variable for Elbo"
    )
    options = parser.parse_args()
    rounds, seconds, open_seconds = (5, 5.0, 60.0)
    if options.quick:
        rounds, seconds, open_seconds = (1, 2.0, 10.0)
    if options.smoke:
        rounds, seconds, open_seconds = (1, 0.1, 0.5)
    options.rounds = options.rounds or rounds
    options.seconds = options.seconds or seconds
    options.open_seconds = options.open_seconds or open_seconds
    options.elbo_settings = dict(setting.split("=", 1) for setting in options.elbo_env)
    return options


def measure_closed_loops(servers: Mapping[str, ServerKind], workload: Workload, options: argparse.Namespace) -> Results:
    """Measure all servers in all rounds. A server that fails is omitted later; `Results.failures` gives the reason."""
    results = Results()
    for name, kind in servers.items():
        if reason := kind.why_unavailable(name):
            results.failures[name] = reason
    for number in range(options.rounds):
        for name, kind in servers.items():
            if name in results.failures:
                continue
            print(f"round {number + 1} of {options.rounds}: {kind.title}", file=sys.stderr, flush=True)
            server = MeasuredServer(name, kind, workload, options.elbo_settings)
            try:
                measure_server(server, results, options.seconds, thorough=not options.smoke)
            except RuntimeError as error:
                results.failures[name] = str(error)
        for rows in workload.rows:
            for part, rate in measure_rates(workload, rows, options.seconds / 10).items():
                results.lower_bounds.setdefault((part, rows), []).append(rate)
    return results


def measure_all(servers: Mapping[str, ServerKind], workload: Workload, options: argparse.Namespace) -> Results:
    """Measure everything, and print each table as soon as it is complete."""
    available = {name: kind for name, kind in servers.items() if not kind.why_unavailable(name)}
    print(", ".join(filter(None, [describe_machine("torch", "uvicorn", "fastapi"), package_versions(available)])))
    command = " ".join(["python", "benchmarks/serving/compare_servers.py", *sys.argv[1:]])
    cores = len(os.sched_getaffinity(0))
    client = "wrk" if WRK else "a Python client, because wrk is not installed (apt-get install wrk)"
    print(
        f"\n`{command}`: {options.rounds} rounds of {options.seconds:g} s on {cores} cores; "
        f"{client} generates the load of the closed loop."
    )
    results = measure_closed_loops(servers, workload, options)
    columns = COLUMNS[::2] if options.smoke else COLUMNS
    tables.print_closed_loop(servers, columns, results)
    tables.print_anomaly(results)
    tables.print_lower_bounds(columns, results)
    outcomes = {}
    for name in filter(None, options.open.split(",")):
        if name not in servers or name in results.failures:
            continue
        server = MeasuredServer(name, servers[name], workload, options.elbo_settings)
        try:
            outcomes[servers[name].title] = measure_open_loop(
                server, rows=options.open_rows, seconds=options.open_seconds, connections=options.open_connections
            )
        except RuntimeError as error:
            results.failures[name] = f"open loop: {error}"
    tables.print_open_loop(outcomes, options.open_rows, options.open_seconds)
    tables.print_targets(evaluate_targets(results, outcomes))
    for name, reason in results.failures.items():
        print(f"\n{servers[name].title} was left out: {reason}")
    return results


def main() -> None:
    """Run the benchmark. Exit with code 1 if Elbo or another server that needs no installation fails."""
    options = parse_options()
    adopt_orphans()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # servers and clients inherit these cores
    kinds = server_kinds(workers=int(options.elbo_settings.get("ELBO_WORKERS", os.environ.get("ELBO_WORKERS", "1"))))
    names = list(kinds)
    if options.smoke:
        names = list(SMOKE_SERVERS)
    if options.only:
        names = options.only.split(",")
    unknown = set(names) - kinds.keys()
    if unknown:
        sys.exit(f"--only: expected names among {', '.join(kinds)}, got {', '.join(sorted(unknown))}")
    servers = {name: kind for name, kind in kinds.items() if name in names}
    with tempfile.TemporaryDirectory(prefix="elbo-bench-") as folder:
        failures = measure_all(servers, create_workload(Path(folder)), options).failures
    if any(servers[name].package is None for name in failures):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; all servers have been stopped")
