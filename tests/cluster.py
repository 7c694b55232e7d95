"""A LocalCluster in a program of its own: `python -m tests.cluster` prints where it is, and ends with its input."""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    import dask
    from distributed import Client, LocalCluster

    workers, failures = int(sys.argv[1]), int(sys.argv[2])
    dask.config.set({"distributed.scheduler.allowed-failures": failures})
    # A LocalCluster gives up a worker that is away for 15 s; one that begins anew on a busy machine may need them.
    dask.config.set({"distributed.deploy.lost-worker-timeout": "600 s"})
    # The port of the dashboard would be the same for every cluster of this machine.
    with (
        LocalCluster(
            processes=True, n_workers=workers, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        Client(cluster) as client,
    ):  # fmt: skip
        sys.stdout.write(json.dumps({"address": cluster.scheduler_address, "workers": client.run(os.getpid)}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
