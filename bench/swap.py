#!/usr/bin/env python3
"""What sparkctl itself costs: start-up, the downtime it adds to a swap, how fast it notices, idle CPU and memory.

    python3 bench/swap.py [--rounds 5] [--idle 60]

Starts everything it measures on loopback: sparkctl, and the pretended Sparks of the test rig with a launcher, a docker
and an engine that take (almost) no time. Prints medians with their spread. The rig's own time is measured by running
the same stop and launch by hand, and taken off. Needs pytest (the rig lives in test_sparkctl.py).
"""
import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_sparkctl as t       # noqa: E402


def row(name, values, unit, aim=""):
    low, middle, high = min(values), statistics.median(values), max(values)
    print(f"{name:58} {middle:8.3f} {unit:4} ({low:.3f} to {high:.3f}, n={len(values)}) {aim}", flush=True)


def answers(rig, port):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1).read()
    return b""


class Watch(threading.Thread):
    """Polls the engine's port every 2 ms; gaps is the list of (went at, came back at, model)."""

    def __init__(self, rig):
        super().__init__(daemon=True)
        self.rig, self.gaps, self.down, self.stop = rig, [], None, False
        self.start()

    def run(self):
        while not self.stop:
            got, now = answers(self.rig, self.rig.port), time.time()
            if not got and self.down is None:
                self.down = now
            elif got and self.down is not None:
                self.gaps.append((self.down, now, json.loads(got)["data"][0]["id"]))
                self.down = None
            time.sleep(0.002)


def start_up(rounds):
    spent = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            p = t.Program(Path(folder), {"SPARK1_HOST": "local"})
            assert p.get("/healthz").status == 200
            spent.append(time.perf_counter() - began)
            p.kill()
    row("start to the first 200", spent, "s")


def make_rig(folder):
    rig = t.Rig(folder)
    for spark in rig.sparks:
        rig.control(spark, "meminfo", t.MEMINFO)
        rig.control(spark, "launcher_sleep", 0)
        rig.control(spark, "stop_delay", 0)
        rig.behave(spark, "*", load=0)
        for repo in ("org/alpha", "org/beta"):
            rig.weights(spark, repo)
    rig.local, rig.port = rig.local_model("spark1", "models/tuned"), rig.free_port("spark1")
    return rig


def by_hand(rig, rounds):
    """Seconds without an answer when the same stop and launch are run by hand."""
    watch, spent = Watch(rig), []
    for i in range(rounds):
        model = ("alpha", "beta")[i % 2]
        command = (f"cd spark-vllm-docker; ./launch-cluster.sh --solo --name vllm_node stop; "
                   f"./launch-cluster.sh --solo --name vllm_node -d exec vllm serve org/{model} --served-model-name {model} --port {rig.port}")
        count = len(watch.gaps)
        rig.sh("spark1", command)
        t.until(lambda: len(watch.gaps) > count)
        spent.append(watch.gaps[-1][1] - watch.gaps[-1][0])
    watch.stop = True
    watch.join()
    rig.sh("spark1", "cd spark-vllm-docker; ./launch-cluster.sh --solo stop")
    return spent[1:]


def swaps(program, rig, rounds, hand):
    watch, down, noticed, reclaim = Watch(rig), [], [], []
    assert program.swap("alpha").status == 200
    for i in range(rounds):
        count = len(watch.gaps)
        got = program.swap(("beta", "alpha")[i % 2]).json
        assert got["phase"] == "ready", got["error"]
        t.until(lambda: len(watch.gaps) > count)
        went, came, _ = watch.gaps[-1]
        log = (program.data / "swaps" / f"{got['id']}.log").read_text()
        warming = next(p for p in got["phases"] if p["phase"] == "warming")["started_at"]
        noticed.append(max(0.0, t.sc.datetime.fromisoformat(warming.replace("Z", "+00:00")).timestamp() - came))
        stopping = next(p for p in got["phases"] if p["phase"] == "stopping")["seconds"]
        reclaim.append(min(1.1, stopping))      # the gate needs a flat second
        down.append(came - went)
        assert "-- warming" in log
    watch.stop = True
    watch.join()
    row("downtime of a swap, all in", down, "s")
    row("  the same stop and launch by hand", hand, "s")
    row("  added by sparkctl, the reclaim gate's second excluded", [d - r - statistics.median(hand) for d, r in zip(down, reclaim)], "s", "aim < 0.5")
    row("ready noticed after the engine's first answer", noticed, "s", "aim <= 0.3")


def checks(program, rig, rounds):
    """How long a swap looks before it touches anything, with vLLM's own parser (a pretended one) and without."""
    def dry():
        began = time.perf_counter()
        assert program.swap("beta", dry_run=True).status == 200
        return time.perf_counter() - began
    row("checks of a healthy pair, the parser's answer not known", [dry() for _ in range(rounds)], "s", "aim < 5")
    for spark in rig.sparks:
        rig.parser(spark)
    dry()
    row("  and known", [dry() for _ in range(rounds)], "s")


def deaf_stop(program, rig, rounds):
    """The stop of a container whose first process ignores SIGTERM, as `sleep` does: docker stop waits 10.2 s, as seen on a real docker."""
    rig.control("spark1", "stop_delay", 10.2)
    took, hand = [], []
    for _ in range(rounds):
        assert program.swap("beta", restart=True).status == 200
        took.append(next(p["seconds"] for p in program.idle()[0]["phases"] if p["phase"] == "stopping"))
        began = time.perf_counter()
        rig.sh("spark1", "cd spark-vllm-docker; ./launch-cluster.sh --solo --name vllm_node stop")
        hand.append(time.perf_counter() - began)
        program.swap("alpha")
    row("stopping, first process deaf to SIGTERM (reclaim gate included)", took, "s")
    row("  the launcher's own stop", hand, "s")
    rig.control("spark1", "stop_delay", 0)


def failures(program, rig, rounds):
    spent = []
    for _ in range(rounds):
        rig.behave("spark1", "beta", mode="die", load=0.6)
        swap = program.post("/api/swap?force=true", {"model": "beta", "rollback": False, "restart": True}).json      # three failures would be enough
        program.phase("loading")
        pid = t.until(lambda: [e[0] for e in rig.engines("spark1") if "org/beta" in e[1]])[0]
        t.until(lambda: not t.alive(pid))
        died = time.time()
        t.until(lambda: program.get(f"/api/swap/{swap['id']}").json["phase"] == "failed" or json.loads(
            (program.data / "swap.json").read_text())["running"]["ending"])
        spent.append(time.time() - died)
        program.idle()
    row("engine's death noticed after it died", spent, "s", "aim <= 2")


def idle(program, seconds):
    """CPU and memory with two Sparks polled and one page open (one long-poll parked)."""
    state, stop = program.get("/api/state").json, []

    def page():
        version = state["version"]
        while not stop:
            with contextlib.suppress(OSError, ValueError):
                version = program.get(f"/api/state?since={version}&wait=20").json["version"]
    threading.Thread(target=page, daemon=True).start()

    def used():
        """(own, of its ended children) seconds of CPU."""
        fields = Path(f"/proc/{program.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return [sum(int(x) for x in fields[i:i + 2]) / os.sysconf("SC_CLK_TCK") for i in (11, 13)]
    before = used()
    time.sleep(seconds)
    (own, children), stop[:] = [b - a for a, b in zip(before, used())], [1]
    rss = int(next(l for l in Path(f"/proc/{program.process.pid}/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1]) / 1024
    print(f"{'idle CPU, % of one core':58} {100 * own / seconds:8.3f} %    over {seconds} s")
    print(f"{'  of its ssh calls (the pretended ssh is a Python program)':58} {100 * children / seconds:8.3f} %")
    print(f"{'idle memory':58} {rss:8.1f} MB   aim < 50")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=int, default=60, help="seconds")
    args = parser.parse_args()
    start_up(args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rig = make_rig(folder)
        program = None
        try:
            hand = by_hand(rig, args.rounds + 1)
            env = t.rig_env(rig, folder, POLL_SECONDS="5")
            program = t.Program(folder, env, ("--models", str(folder / "models.yaml"), "--services", str(folder / "services.yaml")))
            swaps(program, rig, args.rounds, hand)
            checks(program, rig, args.rounds)
            deaf_stop(program, rig, min(3, args.rounds))
            failures(program, rig, args.rounds)
            idle(program, args.idle)
        finally:
            if program:
                program.kill()
            rig.close()


if __name__ == "__main__":
    main()
