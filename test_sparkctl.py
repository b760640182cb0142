"""Tests of sparkctl, in the order of its sections; each name is a sentence that is true.

Most start the real program, `python3 sparkctl.py`, on a free port with its state below tmp_path, against pretended
Sparks: the rig at the end of this file is a fake ssh with launcher, docker and vLLM stand-ins that behave, and
misbehave, as the real ones were seen to. Waits end on events and have limits; there is no network but loopback.
Run: python3 -m pytest -q test_sparkctl.py
"""
import ast
import base64
import concurrent.futures
import contextlib
import functools
import hashlib
import hmac
import http.client
import json
import marshal
import os
import pwd
import queue
import random
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import types
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import sparkctl as sc

HERE = Path(sc.__file__).resolve().parent
SOURCE = (HERE / "sparkctl.py").read_text()
CI = os.environ.get("CI") == "true"


def need(present, what):
    """Skip a test where something optional is missing; in CI nothing may be missing."""
    if not present:
        (pytest.fail if CI else pytest.skip)(f"{what} is not installed")


# === harness ==================================================================

def until(check, seconds=20, what="what was waited for"):
    """The first true value of check(), asked again and again for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if got := check():
            return got
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {seconds} s")


class Reply:
    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, headers, body

    def __repr__(self):                 # what a failed assertion shows
        return f"{self.status} {self.body[:2000]!r}"

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        return self.json["error"]["code"]


class Program:
    """A running `python3 sparkctl.py`."""

    def __init__(self, tmp_path, env=None, args=(), wait=True):
        self.dir, self.env, self.args = tmp_path, env or {}, args
        self.data = Path(self.env.get("SPARKCTL_DATA", tmp_path / "data"))
        self.start(wait)

    def start(self, wait=True):
        clean = {k: v for k, v in os.environ.items() if k not in sc.SETTING}
        self.log = open(self.dir / "sparkctl.log", "ab")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sparkctl.py"), "--port", "0", *self.args],
            env={**clean, "SPARKCTL_DATA": str(self.data), "PYTHONFAULTHANDLER": "1", **self.env}, stdout=subprocess.PIPE, stderr=self.log, cwd="/")
        if wait:
            line = self.process.stdout.readline().decode()
            assert line.startswith("sparkctl "), (line, (self.dir / "sparkctl.log").read_text()[-2000:])
            self.port = int(re.search(r":(\d+)/", line)[1])
        return self

    def call(self, method, path, body=None, headers=None, timeout=60):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            if body is not None and not isinstance(body, (bytes, str)):
                body = json.dumps(body)
            c.request(method, path, body, headers or {})
            r = c.getresponse()
            return Reply(r.status, r.headers, r.read())
        finally:
            c.close()

    def get(self, path, **more):
        return self.call("GET", path, **more)

    def post(self, path, body=None, **more):
        return self.call("POST", path, {} if body is None else body, **more)

    def swap(self, model, wait=60, **body):
        return self.post(f"/api/swap?wait={wait}", {"model": model, **body})

    def idle(self):
        """Wait until no swap runs -> recent swaps, newest first."""
        return until(lambda: not (got := self.get("/api/swap").json)["running"] and got["recent"], what="the end of all swaps")

    def running(self):
        return self.get("/api/swap").json["running"]

    def phase(self, *wanted):
        """Wait until the running swap is in one of these phases -> the swap."""
        return until(lambda: (s := self.running()) and s["phase"] in wanted and s, what=f"phase {wanted}")

    def journaled(self, phase):
        """Wait until the journal says that the running swap is in that phase; None: that none runs."""
        path = self.data / "swap.json"
        until(lambda: path.exists() and (json.loads(path.read_text())["running"] or {}).get("phase") == phase, what=f"journal of {phase}")

    def kill(self, number=signal.SIGKILL):
        self.process.send_signal(number)
        try:
            code = self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)        # PYTHONFAULTHANDLER tells where its threads are
            self.process.wait(5)
            raise AssertionError("did not end: " + self.said()[-6000:]) from None
        self.process.stdout.close()
        self.log.close()
        return code

    def restart(self, number=signal.SIGKILL):
        self.kill(number)
        return self.start()

    def said(self):
        return (self.dir / "sparkctl.log").read_text()


CATALOG = """
models:
  alpha: {repo: org/alpha, aliases: [gpt-4o], knobs: {max-model-len: 4096, gpu-memory-utilization: 0.5}}
  beta: {repo: org/beta, knobs: {gpu-memory-utilization: 0.5}}
  wide: {repo: org/wide, mode: cluster, knobs: {gpu-memory-utilization: 0.5}}
  tuned: {local_path: LOCAL, knobs: {gpu-memory-utilization: 0.5}}
  fancy: {repo: org/fancy, args: [--override-generation-config, '{"temperature": 1.0}'], env: {SAY: "it's $HOME; `id`"}, knobs: {gpu-memory-utilization: 0.5}}
"""
MEMINFO = "MemTotal:       127600000 kB\nMemFree:         2000000 kB\nMemAvailable:   120000000 kB\n"


@pytest.fixture
def rig(tmp_path):
    r = Rig(tmp_path)
    for spark in r.sparks:
        r.control(spark, "meminfo", MEMINFO)
        r.control(spark, "glance")
        r.control(spark, "launcher_sleep", 0)
        r.control(spark, "stop_delay", 0.05)
        r.behave(spark, "*", load=0.3)
        for repo in ("org/alpha", "org/beta", "org/wide", "org/fancy"):
            r.weights(spark, repo)
    r.local = r.local_model("spark1", "models/tuned")
    r.port = r.free_port("spark1")
    yield r
    r.close()


@pytest.fixture
def looked_at(rig):
    """Polls see all of a Spark, as they do outside of most tests."""
    for spark in rig.sparks:
        rig.clear(spark, "glance")


@pytest.fixture
def start(tmp_path):
    """Start programs that end with the test."""
    programs = []

    def go(env=None, args=(), **more):
        programs.append(Program(tmp_path, env, args, **more))
        return programs[-1]
    yield go
    for p in programs:
        if p.process.poll() is None:
            p.kill()


def rig_env(rig, tmp_path, **more):
    (tmp_path / "models.yaml").write_text(CATALOG.replace("LOCAL", str(rig.local)))
    (tmp_path / "services.yaml").touch()
    return {"PATH": f"{rig.bin}:{os.environ['PATH']}", "SPARK1_HOST": "spark1", "SPARK2_HOST": "spark2", "VLLM_PORT": str(rig.port),
            "LOCAL_MODEL_ROOTS": str(tmp_path), "POLL_SECONDS": "1", "SWAP_DRAIN_SECONDS": "5", "SWAP_STOP_TIMEOUT": "12",
            "TMPDIR": "/tmp", **more}


@pytest.fixture
def two(rig, start, tmp_path):
    """sparkctl in charge of two pretended Sparks, serving nothing yet."""
    p = start(rig_env(rig, tmp_path), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    p.rig = rig
    return p


def serves(program):
    return program.get("/api/state").json["slots"][0]


def errors_of(swap):
    return swap["error"]["code"], swap["error"]["message"], swap["error"]["remedy"]


# === 10 coordination ==========================================================

def token(t):
    return {"X-Swap-Lock-Token": t}


def lock(program, holder="daily-vol", **body):
    """Take the lock -> what its holder is told."""
    got = program.post("/api/swap/lock", {"holder": holder, **body})
    assert got.status == 201, got.body
    return got.json


def kinds(program):
    return [e["kind"] for e in program.get("/api/events").json["events"]]


def background(call, *args, **more):
    return concurrent.futures.ThreadPoolExecutor(1).submit(call, *args, **more)


@contextlib.contextmanager
def parked(program, path, body, headers=()):
    """A POST that waits for its answer -> its socket; the client is gone when the block ends."""
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", program.port), 10) as sock:
        sock.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n".encode()
                     + "".join(f"{k}: {v}\r\n" for k, v in dict(headers).items()).encode() + b"\r\n" + data)
        yield sock


def test_a_lock_is_taken_extended_and_given_back_by_its_token_alone(bare):
    assert bare.get("/api/swap/lock").json == {"locked": False}
    first = lock(bare, ttl=600, note="vol surface")
    shown = bare.get("/api/swap/lock").json
    assert shown["locked"] and (shown["holder"], shown["note"], shown["fence"], shown["queue"]) == ("daily-vol", "vol surface", first["fence"], 0)
    assert 590 < shown["expires_in"] <= 600 and "token" not in shown and bare.get("/api/state").json["lock"]["holder"] == "daily-vol"
    refused = bare.post("/api/swap/lock", {"holder": "daily-vol"})
    assert (refused.status, refused.code) == (409, "lock_held") and 590 <= int(refused.headers["Retry-After"]) <= 600
    assert refused.json["error"]["holder"] == "daily-vol" and refused.json["error"]["expires_at"] == shown["expires_at"]
    again = bare.post("/api/swap/lock", {"holder": "daily-vol", "ttl": 1200}, headers=token(first["token"])).json
    assert (again["token"], again["fence"]) == (first["token"], first["fence"]) and again["expires_in"] > 1190
    for wrong in ({}, token("0" * 64), token("é")):
        got = bare.call("DELETE", "/api/swap/lock", headers={k: v.encode() for k, v in wrong.items()})
        assert (got.status, got.code) == (403, "lock_token_wrong")
    assert bare.call("DELETE", "/api/swap/lock", headers=token(first["token"])).json == {"locked": False, "released": True}
    assert bare.call("DELETE", "/api/swap/lock").json == {"locked": False, "released": False}
    second = lock(bare, "other")
    assert second["fence"] == first["fence"] + 1 and second["token"] != first["token"] and 890 < second["expires_in"] <= 900
    assert bare.call("DELETE", "/api/swap/lock", headers=token(first["token"])).status == 403
    assert bare.call("DELETE", "/api/swap/lock?force=true").status == 200
    assert kinds(bare)[:6] == ["lock_override", "lock_acquired", "lock_released", "lock_extended", "lock_acquired", "started"]
    assert "127.0.0.1" in bare.get("/api/events").json["events"][0]["text"]


@pytest.mark.parametrize("body,field", [({}, "holder"), ({"holder": ""}, "holder"), ({"holder": "a", "ttl": 0}, "ttl"), ({"holder": "a", "ttl": 86401}, "ttl"),
                                        ({"holder": "a", "ttl": "900"}, "ttl"), ({"holder": "a", "ttl": True}, "ttl"), ({"holder": "a", "wait": -1}, "wait"),
                                        ({"holder": "a\nb"}, "holder"), ({"holder": 7}, "holder"), ({"holder": "a", "tll": 5}, "tll")])
def test_a_wish_for_the_lock_that_makes_no_sense_names_its_field(bare, body, field):
    got = bare.post("/api/swap/lock", body)
    assert (got.status, got.json["error"]["field"]) == (422, field) and bare.get("/api/swap/lock").json == {"locked": False}


def test_a_lock_ends_on_time_and_its_token_with_it(bare):
    mine = lock(bare, ttl=1)
    version = bare.get("/api/state").json["version"]
    assert bare.get(f"/api/state?since={version}&wait=10").json["lock"] == {"locked": False}    # a parked reader is told
    assert kinds(bare)[0] == "lock_expired"
    other = lock(bare, "other", ttl=60)
    lost = bare.post("/api/swap/lock", {"holder": "daily-vol"}, headers=token(mine["token"]))      # it was not exclusive all the time
    assert (lost.status, lost.code, lost.json["error"]["holder"]) == (409, "lock_lost", "other")
    assert other["fence"] == mine["fence"] + 1


def test_the_queue_is_served_in_order_and_who_hangs_up_leaves_it(bare):
    first, waiting = lock(bare, "first"), []

    def queue_is(n):
        until(lambda: bare.get("/api/swap/lock").json["queue"] == n, what=f"a queue of {n}")
    for n, name in enumerate(("a", "gone", "b"), 1):
        if name == "gone":
            gone = contextlib.ExitStack()
            gone.enter_context(parked(bare, "/api/swap/lock", {"holder": "gone", "wait": 60}))
        else:
            waiting.append(background(lock, bare, name, wait=60))
        queue_is(n)
    gone.close()
    queue_is(2)
    order = []
    for _ in waiting:
        bare.call("DELETE", "/api/swap/lock", headers=token((order[-1] if order else first)["token"]))
        holder = until(lambda: (got := bare.get("/api/swap/lock").json)["locked"] and got["holder"])
        order.append(waiting["ab".index(holder)].result(20))
    assert [o["holder"] for o in order] == ["a", "b"] and order[0]["fence"] < order[1]["fence"]
    got = bare.post("/api/swap/lock", {"holder": "late", "wait": 0.3})
    assert (got.status, got.code) == (409, "lock_held") and bare.get("/api/swap/lock").json["queue"] == 0


def test_a_lock_given_to_a_client_that_is_gone_is_given_on(bare):
    first = lock(bare, "first")
    with parked(bare, "/api/swap/lock", {"holder": "gone", "wait": 60}):
        until(lambda: bare.get("/api/swap/lock").json["queue"] == 1)
    bare.call("DELETE", "/api/swap/lock", headers=token(first["token"]))        # most likely before its absence was noticed
    assert lock(bare, "next", wait=20)["holder"] == "next"


def test_who_hangs_up_while_extending_a_lock_keeps_it(bare):
    mine = lock(bare, ttl=600)
    for _ in range(5):
        with parked(bare, "/api/swap/lock", {"holder": "daily-vol", "ttl": 700}, token(mine["token"])):
            pass
    until(lambda: kinds(bare).count("lock_extended") == 5)
    assert bare.get("/api/swap/lock").json["fence"] == mine["fence"]


def test_a_lock_whose_answer_was_never_sent_ends_with_the_program(tmp_path):
    m = manager(tmp_path)
    m.acquire("unanswered", 600, swap="asked", told=False)
    assert manager(tmp_path).lock_info() == {"locked": False}
    told = m.answered(m.book.lease.fence)
    assert manager(tmp_path).lock_info()["fence"] == told.fence


def test_a_lock_survives_a_restart_and_the_fence_grows_on(bare):
    mine = lock(bare, ttl=600, note="n")
    before = bare.get("/api/swap/lock").json
    for number in (signal.SIGKILL, signal.SIGTERM):
        bare.restart(number)
        after = bare.get("/api/swap/lock").json
        assert {k: v for k, v in after.items() if k != "expires_in"} == {k: v for k, v in before.items() if k != "expires_in"}
    assert bare.post("/api/swap/lock", {"holder": "daily-vol", "ttl": 1}, headers=token(mine["token"])).status == 201
    bare.kill()
    time.sleep(1.1)                     # the lease's own length, while sparkctl is not there
    bare.start()
    assert bare.get("/api/swap/lock").json == {"locked": False}
    until(lambda: "lock_expired" in kinds(bare))
    assert lock(bare)["fence"] == mine["fence"] + 1


def test_a_lost_journal_never_makes_the_fence_go_back_nor_an_old_token_good(bare):
    mine = lock(bare)
    bare.kill()
    (bare.data / "swap.json").unlink()
    bare.start()
    new = lock(bare)
    assert new["fence"] > mine["fence"] and new["token"] != mine["token"]


@functools.cache
def store_of(**settings):
    with tempfile.TemporaryDirectory() as d:
        Path(d, "models.yaml").write_text(CATALOG.replace("LOCAL", "/data/tuned"))
        return sc.ConfigStore(sc.parse_settings({"SPARK1_HOST": "local", "SPARK2_HOST": "127.0.0.2", **settings}),
                              {"models": d + "/models.yaml", "overrides": d + "/none", "services": d + "/none"})


def manager(tmp_path, **settings):
    """A SwapManager in this process whose thread does not run: swaps are begun, and ended by finish()."""
    store = store_of(**settings)
    events, warnings = [], []
    got = sc.SwapManager(str(tmp_path), lambda: store.current, None, sc.Hub(), sc.Gate(), lambda kind, said, **facts: events.append((kind, said, facts)), warnings.append)
    got.told, got.warnings = events, warnings
    return got


def finish(m, phase="ready"):
    m._enter("checking")
    m._conclude(phase, error={"code": "x", "message": "x", "remedy": ""} if phase == "failed" else None) if phase != "ready" else None
    if phase == "ready":
        m._enter("draining")
        m._enter("stopping", touched=True)
        if m.book.running.model:
            m._update(plan=sc.Plan(m.book.running.slot, m.book.running.model, (m.book.running.model,), ("spark1",), 1, "c", "b", "", "", "", "", ""))
            for p in ("launching", "loading", "warming"):
                m._enter(p)
        m._conclude("ready", plans={m.book.running.slot: m.book.running.plan})


def test_a_wall_clock_that_is_set_neither_shortens_nor_stretches_a_lease(tmp_path, monkeypatch):
    m, real = manager(tmp_path), time.time
    m.acquire("a", 600)
    for jump in (86400, -86400):
        monkeypatch.setattr(sc.time, "time", lambda: real() + jump)
        shown = m.lock_info()
        assert 590 < shown["expires_in"] <= 600
        assert abs(sc.parse_utc(shown["expires_at"]) - (real() + jump + 600)) < 5       # shown by the clock as it is now
        later = manager(tmp_path)                                                       # a restart of sparkctl
        assert 590 < later.lock_info()["expires_in"] <= 600
    monkeypatch.setattr(sc.time, "time", lambda: real() + 100)
    monkeypatch.setattr(sc, "boot_id", lambda: "another boot")
    assert 490 < manager(tmp_path).lock_info()["expires_in"] <= 500                     # a reboot: the wall clock is all there is
    monkeypatch.setattr(sc.time, "time", lambda: 0.0)                                   # and it may be wrong
    assert manager(tmp_path).lock_info()["expires_in"] <= sc.LEASE_MAX_S


def test_what_takes_longer_than_a_lease_has_left_stretches_it_this_once(tmp_path):
    m = manager(tmp_path)
    held = m.token(m.acquire("a", 100).lease)
    with m.holding(held, False, "restart of asr", "127.0.0.1", ttl=300):
        assert 290 < m.book.lease.left() <= 300 and m.book.lease.ttl == 100
    assert m.acquire("", 50, token=held).lease.ttl == 50


def test_a_lease_counts_for_nothing_from_the_moment_it_is_over(tmp_path):
    m = manager(tmp_path)
    old = m.token(m.acquire("a", 0.01).lease)
    until(lambda: m.book.lease.left() <= 0)
    assert m.start("main", "alpha").holder is None and m.release(old) is False
    assert m.acquire("b", 60).lease.fence == 2 and [kind for kind, *_ in m.told if kind.startswith("lock")] == ["lock_acquired", "lock_expired", "lock_acquired"]


def test_without_the_token_nothing_that_touches_the_gpu_begins(two):
    assert two.swap("alpha").status == 200
    mine = lock(two, ttl=600)
    for method, path, body in (("POST", "/api/swap?wait=30", {"model": "beta"}), ("POST", "/api/unload", {}), ("POST", "/api/swap", {"model": "alpha", "restart": True})):
        for headers in ({}, token("0" * 64)):
            got = two.call(method, path, body, headers)
            error = got.json["error"]
            assert (got.status, error["code"], error["holder"]) == (423, "swap_locked", "daily-vol"), got.body
            assert error["expires_at"] and 590 < error["eta_seconds"] <= 600 and int(got.headers["Retry-After"]) > 590 and "daily-vol" in error["message"]
    assert two.swap("beta", dry_run=True).json["phase"] == "planned"
    swap = two.post("/api/swap", {"model": "beta"}, headers=token(mine["token"])).json
    assert (swap["holder"], swap["forced"]) == ("daily-vol", False)
    assert two.call("DELETE", f"/api/swap/{swap['id']}").status == 423              # the holder's swap is the holder's to cancel
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))              # a swap in flight goes on without it
    assert two.get(f"/api/swap/{swap['id']}?wait=30").json["phase"] == "ready"
    lock(two, "colleague")
    forced = two.post("/api/swap?wait=30&force=true", {"model": "alpha"})
    assert forced.status == 200 and forced.json["forced"] and forced.json["holder"] is None
    event = next(e for e in two.get("/api/events").json["events"] if e["kind"] == "lock_override")
    assert (event["client"], event["overridden"], event["swap"]) == ("127.0.0.1", "colleague", forced.json["id"])
    assert two.get("/api/swap/lock").json["holder"] == "colleague"                  # overriding is not ending


def test_the_holders_swap_can_be_cancelled_with_the_token_or_by_force(two):
    mine = lock(two)
    for headers, query in ((token(mine["token"]), ""), ({}, "?force=true")):
        two.rig.behave("spark1", "alpha", load=20)
        swap = two.post("/api/swap", {"model": "alpha"}, headers=token(mine["token"])).json
        two.phase("loading")
        assert two.call("DELETE", f"/api/swap/{swap['id']}{query}", headers=headers).status == 202
        two.idle()
    assert "lock_override" in kinds(two)


def test_the_token_is_in_no_file_log_event_or_answer_but_the_holders(two):
    mine = lock(two)
    two.post("/api/swap?wait=30", {"model": "alpha"}, headers=token(mine["token"]))
    two.post("/api/swap/lock", {"holder": "x"})
    two.swap("beta")
    combined = two.call("DELETE", "/api/swap/lock?force=true") and two.post("/api/swap?wait=30", {"model": "beta", "lock": {"holder": "c"}},
                                                                           headers={"Idempotency-Key": "k"}).json["lock"]["token"]
    answers = b"".join(two.get(path).body for path in ("/api/state", "/api/swap", "/api/swap/lock", "/api/events", "/api/jobs", "/api/settings"))
    kept = b"".join(p.read_bytes() for p in two.data.rglob("*") if p.is_file())
    secret = (two.data / "lock.secret").read_bytes()
    assert (two.data / "lock.secret").stat().st_mode & 0o777 == 0o600
    for word in (mine["token"].encode(), combined.encode(), secret.hex().encode()):
        assert word not in answers + kept + two.said().encode()


def test_a_swap_begins_only_with_the_right_to_whatever_two_hundred_threads_do(tmp_path, monkeypatch):
    """Each written journal is one decision, in order: a swap that appears in one must have had the right then."""
    m, docs, write, outcomes = manager(tmp_path), [], sc.write_atomic, []
    monkeypatch.setattr(sc, "write_atomic", lambda path, data, mode=0o600: docs.append((sc.boot_clock(), json.loads(data))) if path.endswith("swap.json") else None)
    begin, over = threading.Barrier(201), threading.Event()

    def client(n):
        dice = random.Random(n)
        begin.wait(30)
        while not over.is_set():
            mine = ""
            with contextlib.suppress(sc.Refused):
                if dice.random() < 0.5:
                    lease = m.acquire(f"h{n}", dice.choice((0.0005, 0.02, 60))).lease
                    mine = m.token(lease)
                m.start("main", "alpha", mine, force=dice.random() < 0.05)
                outcomes.append("started")
            with contextlib.suppress(sc.Refused):
                if mine and dice.random() < 0.9:
                    m.release(mine)
                elif dice.random() < 0.05:
                    m.release(force=True)
    threads = [threading.Thread(target=client, args=(n,), daemon=True) for n in range(200)]
    for t in threads:
        t.start()
    begin.wait(30)
    for _ in range(60):
        until(lambda: m.book.running, what="a swap")
        finish(m, "failed" if random.random() < 0.5 else "cancelled")
        with m._lock:
            m.recent = ()              # the breaker is not what is tested
    over.set()
    for t in threads:
        t.join(30)
    begun = with_token = 0
    for (_, old), (at, new) in zip(docs, docs[1:]):
        swap = new["running"]
        if swap and (not old["running"] or old["running"]["id"] != swap["id"]):
            begun += 1
            lease = old["lease"]
            held = lease is not None and lease["ends"] > at
            if swap["forced"]:
                continue
            assert (swap["fence"] == lease["fence"]) if held else not swap["fence"] or lease["fence"] == swap["fence"], (old, swap)
            with_token += bool(swap["fence"])
    fences = [d["lease"]["fence"] for _, d in docs if d["lease"]]
    assert begun >= 60 and with_token > 5 and fences == sorted(fences) and write is not None


# --- lock and swap in one

def combined(program, model="alpha", key=None, holder="daily-vol", **wish):
    return program.post("/api/swap?wait=60", {"model": model, "lock": {"holder": holder, "ttl": 600, **wish}}, headers={"Idempotency-Key": key} if key else {})


def test_one_request_takes_the_lock_swaps_and_tells_the_token(two):
    got = combined(two)
    assert got.status == 200 and got.json["phase"] == "ready" and got.json["holder"] == "daily-vol"
    mine = got.json["lock"]
    assert two.get("/api/swap/lock").json["fence"] == mine["fence"] and two.swap("beta").status == 423
    assert two.post("/api/swap?wait=30", {"model": "beta"}, headers=token(mine["token"])).status == 200
    served = two.post("/api/swap?wait=30", {"model": "beta", "lock": {"holder": "daily-vol"}}, headers=token(mine["token"]))
    assert served.status == 200 and served.json["already_serving"] and served.json["lock"]["fence"] == mine["fence"]
    assert two.call("DELETE", "/api/swap/lock", headers=token(mine["token"])).status == 200
    assert combined(two, "beta").json["lock"]["fence"] == mine["fence"] + 1             # served already: the lock is taken all the same
    two.restart()
    assert two.get("/api/swap/lock").json["fence"] == mine["fence"] + 1


def test_a_combined_swap_that_fails_rolls_back_gives_the_lock_back_and_answers_then(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="oom")
    two.rig.behave("spark1", "alpha", mode="ok", load=2)
    answer = background(combined, two, "beta")
    until(lambda: (s := two.running()) and s["rollback_of"] and s["phase"] == "loading")
    assert two.get("/api/swap/lock").json["holder"] == "daily-vol" and not answer.done()
    got = answer.result(60)
    assert got.status == 502 and "lock" not in got.json
    assert two.running() is None and two.get("/api/swap/lock").json == {"locked": False}
    assert serves(two)["model"] == "alpha" and two.get(f"/api/swap/{got.json['rollback_id']}").json["phase"] == "ready"
    assert combined(two, "nope").status == 404 and two.get("/api/swap/lock").json == {"locked": False}


def test_a_combined_swap_waits_for_the_one_that_runs_and_others_for_its_lock(two):
    two.rig.behave("spark1", "alpha", load=1)
    plain = two.post("/api/swap", {"model": "alpha"}).json["id"]
    assert combined(two, "beta").code == "swap_running" and two.get("/api/swap/lock").json == {"locked": False}
    first = background(combined, two, "beta", holder="first", wait=60)
    until(lambda: two.get("/api/swap/lock").json["locked"])
    assert combined(two, "fancy", holder="second", wait=0.2).code == "lock_held"
    assert first.result(60).json["holder"] == "first" and two.get(f"/api/swap/{plain}").json["phase"] == "ready"
    assert two.idle()[0]["model"] == "beta"


def test_a_combined_swap_waits_its_turn_for_the_lock(two):
    mine = lock(two)
    waits = background(two.post, "/api/swap?wait=60", {"model": "alpha", "lock": {"holder": "second", "wait": 60}})
    until(lambda: two.get("/api/swap/lock").json["queue"] == 1)
    assert two.running() is None
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    assert waits.result(60).json["holder"] == "second"


@pytest.mark.parametrize("restart", [False, True])
def test_the_lock_of_a_client_that_vanished_ends_with_its_swap(two, restart):
    two.rig.behave("spark1", "alpha", load=2)
    with parked(two, "/api/swap?wait=60", {"model": "alpha", "lock": {"holder": "gone"}}):
        two.journaled("loading")
    if restart:
        two.restart()
    assert two.get("/api/swap/lock").json["holder"] == "gone"       # its swap is still under way
    assert two.idle()[0]["phase"] == "ready"
    until(lambda: two.get("/api/swap/lock").json == {"locked": False}, 5)


def test_the_time_of_a_combined_lock_runs_from_its_answer_on(two):
    two.rig.behave("spark1", "alpha", load=2)
    plain = two.post("/api/swap", {"model": "alpha"}).json["id"]
    got = two.post("/api/swap?wait=60", {"model": "beta", "lock": {"holder": "a", "ttl": 1, "wait": 60}})        # both take longer than its ttl
    assert got.status == 200 and got.json["holder"] == "a" and 0 < got.json["lock"]["expires_in"] <= 1
    assert two.get(f"/api/swap/{plain}").json["phase"] == "ready"
    until(lambda: two.get("/api/swap/lock").json == {"locked": False}, 5)
    for path, body in (("/api/swap", {"model": "alpha"}), ("/api/unload", {}), ("/api/swap/lock", {"holder": "a"}), ("/api/swap", {"model": "alpha", "lock": {"holder": "a"}})):
        assert two.post(path, body, headers=token(got.json["lock"]["token"])).code == "lock_lost"
    assert two.post("/api/swap", {"model": "alpha", "lock": {}}).json["error"]["field"] == "holder"


def test_the_lock_of_a_swap_that_is_not_waited_for_begins_to_run_out_when_it_serves(two):
    two.rig.behave("spark1", "alpha", load=4)
    mine = two.post("/api/swap", {"model": "alpha", "lock": {"holder": "a", "ttl": 3}}).json["lock"]
    assert two.idle()[0]["phase"] == "ready" and two.get("/api/swap/lock").json["fence"] == mine["fence"]
    assert two.call("DELETE", "/api/swap/lock", headers=token(mine["token"])).json["released"]


def test_a_dry_run_gives_way_to_a_real_swap(two):
    two.rig.control("spark1", "latency", 2)
    dry = background(two.swap, "beta", dry_run=True)
    two.phase("checking")
    real = two.post("/api/swap", {"model": "alpha"})
    assert real.status == 202
    two.rig.clear("spark1", "latency")
    assert (dry.result(30).status, dry.result(30).json["phase"]) == (409, "cancelled")
    assert two.get(f"/api/swap/{real.json['id']}?wait=30").json["phase"] == "ready"


def test_another_request_with_the_same_key_leaves_nothing_in_the_queue(two):
    mine = lock(two)
    first = background(combined, two, key="k", wait=60)
    until(lambda: two.get("/api/swap/lock").json["queue"] == 1)
    second = background(combined, two, "beta", key="k", holder="other", wait=60)
    until(lambda: two.get("/api/swap/lock").json["queue"] == 2)
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    assert second.result(30).code == "idempotency_mismatch" and first.result(30).status == 200
    assert two.get("/api/swap/lock").json["queue"] == 0


def test_a_client_that_vanished_before_its_swap_began_holds_nothing(two):
    mine = lock(two)
    with parked(two, "/api/swap?wait=60", {"model": "alpha", "lock": {"holder": "gone", "wait": 60}}, {"Idempotency-Key": "k"}):
        until(lambda: two.get("/api/swap/lock").json["queue"] == 1)
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    until(lambda: two.get("/api/swap/lock").json == {"locked": False}, 10)
    assert two.get("/api/swap").json["recent"] == []


def test_whoever_waits_when_sparkctl_ends_is_told_and_leaves_no_lock(two):
    two.rig.behave("spark1", "alpha", load=3)
    plain = two.post("/api/swap", {"model": "alpha"}).json["id"]
    answer = background(combined, two, "beta", wait=60)
    until(lambda: two.get("/api/swap/lock").json["locked"])
    assert two.kill(signal.SIGTERM) == 0
    assert answer.result(10).status in (409, 503)
    two.start()
    assert two.get("/api/swap/lock").json == {"locked": False} and two.get(f"/api/swap/{plain}?wait=30").json["phase"] == "ready"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_lock_of_a_swap_job_outlives_a_restart_and_ends_with_its_swap_though_the_job_was_deleted(two, number):
    two.rig.behave("spark1", "alpha", load=3)
    due(two, id="j", kind="swap", model="alpha")
    two.journaled("loading")
    assert two.call("DELETE", "/api/jobs/j").status == 200
    two.restart(number)
    assert two.get("/api/swap/lock").json["holder"] == "job j" and two.idle()[0]["phase"] == "ready"
    until(lambda: two.get("/api/swap/lock").json == {"locked": False}, 5)


@pytest.mark.parametrize("restart", [False, True])
def test_the_same_idempotency_key_joins_the_swap_and_is_told_the_same_token_later(two, restart):
    two.rig.behave("spark1", "alpha", load=2)
    with parked(two, "/api/swap?wait=60", {"model": "alpha", "lock": {"holder": "daily-vol", "ttl": 600}}, {"Idempotency-Key": "run-7"}):
        two.journaled("loading")
        first = two.running()["id"]
    if restart:
        two.restart()
    got = combined(two, key="run-7")
    assert (got.status, got.json["id"]) == (200, first)
    two.journaled(None)
    two.restart()
    again = combined(two, key="run-7")
    assert (again.json["id"], again.json["lock"]["token"]) == (first, got.json["lock"]["token"])
    assert len(launches(two.rig)) == 1
    assert two.call("DELETE", "/api/swap/lock", headers=token(again.json["lock"]["token"])).status == 200
    assert "lock" not in combined(two, key="run-7").json            # that one is over; the swap is still the answer
    other = combined(two, "beta", key="run-7")
    assert (other.status, other.code) == (422, "idempotency_mismatch")


def test_refusals_are_not_kept_under_their_key_and_a_served_model_is(two):
    mine = lock(two)
    key = {"Idempotency-Key": "k"}
    assert two.post("/api/swap?wait=30", {"model": "alpha"}, headers=key).status == 423
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    first = two.post("/api/swap?wait=30", {"model": "alpha"}, headers=key)
    assert first.status == 200
    served = two.post("/api/swap?wait=30", {"model": "alpha"}, headers={"Idempotency-Key": "other"})
    assert served.json["already_serving"]
    assert two.swap("beta").status == 200
    assert two.post("/api/swap?wait=30", {"model": "alpha"}, headers={"Idempotency-Key": "other"}).json["already_serving"]
    assert two.post("/api/swap?wait=30", {"model": "alpha"}, headers=key).json["id"] == first.json["id"]
    assert serves(two)["model"] == "beta"
    assert two.post("/api/swap", {"model": "alpha"}, headers={"Idempotency-Key": ""}).status == 400


def test_who_lost_the_lock_learns_it_though_the_model_is_served(two):
    two.rig.behave("spark1", "alpha", load=2)
    plain = two.post("/api/swap", {"model": "alpha"}).json["id"]
    answer = background(combined, two, "alpha", holder="night", wait=60)
    until(lambda: two.get("/api/swap/lock").json["locked"])
    assert two.call("DELETE", "/api/swap/lock?force=true").status == 200
    thief = lock(two, "thief")
    assert answer.result(60).status in (409, 423) and two.get(f"/api/swap/{plain}?wait=60").json["phase"] == "ready"     # its own end does not matter
    two.call("DELETE", "/api/swap/lock", headers=token(thief["token"]))
    assert two.post("/api/swap?wait=5", {"model": "alpha"}, headers=token(thief["token"])).code == "lock_lost"
    two.rig.behave("spark1", "beta", load=2)
    answer = background(combined, two, "beta", holder="night")
    two.phase("loading")
    assert two.call("DELETE", "/api/swap/lock?force=true").status == 200
    assert answer.result(60).code == "lock_lost" and serves(two)["model"] == "beta"


def owes_a_rollback(tmp_path):
    """A manager in which beta failed to take alpha's place, so that alpha's rollback runs."""
    m = manager(tmp_path)
    m.start("main", "alpha")
    finish(m)
    m.start("main", "beta")
    m._enter("checking")
    m._enter("draining")
    m._enter("stopping", touched=True, previous=m.book.slots["main"])
    m._conclude("failed", rollback=True, plans={"main": None}, error={"code": "x", "message": "x", "remedy": ""})
    return m


def test_a_rollback_that_ended_well_is_not_owed_to_the_swap_that_waited_for_it(tmp_path):
    m = owes_a_rollback(tmp_path)
    waits = m.start("main", "beta")
    assert m.book.running.rollback_of and m.book.waiting.id == waits.id
    finish(m)                                               # the rollback came to its end before it heard of the other
    assert m.book.running.id == waits.id and m.book.running.previous is None and not m.gate.is_held("main")


@pytest.mark.parametrize("restarted", [False, True])
def test_a_swap_that_waits_its_turn_can_be_cancelled_and_ends_at_its_beginning(tmp_path, restarted):
    m = manager(tmp_path)
    preview, waits = m.start("main", "beta", dry_run=True), m.start("main", "alpha")
    assert m._cancel.is_set() and m.cancel(waits.id).cancelling and m.book.running.id == preview.id
    if restarted:
        m = manager(tmp_path)
        assert m.book.waiting.cancelling
    m._conclude("cancelled")
    assert m.book.running.id == waits.id and m.book.waiting is None and m._cancel.is_set()
    m._drive()
    assert m.get(waits.id).phase == "cancelled" and [name for name, *_ in m.get(waits.id).phases] == ["queued", "cancelled"]
    assert not m._cancel.is_set() and m.book.running is None


def test_requests_are_held_through_a_restart_while_a_swap_that_took_a_rollbacks_place_is_checked(tmp_path):
    m = owes_a_rollback(tmp_path)
    m.start("main", "beta")
    m._enter("checking")
    m._conclude("cancelled")
    assert m.book.running.previous.model == "alpha" and m.book.running.holds and manager(tmp_path).gate.is_held("main")


def test_a_key_is_good_for_a_day(tmp_path, monkeypatch):
    m, real, key = manager(tmp_path), time.time, ("k", "hash")
    first = m.start("main", "alpha", key=key)
    finish(m, "cancelled")
    with pytest.raises(sc.Answered):
        m.start("main", "alpha", key=key)
    monkeypatch.setattr(sc.time, "time", lambda: real() + 86401)
    assert m.start("main", "alpha", key=key).id != first.id


def test_a_swap_that_a_key_names_outlives_the_fifty_that_are_kept(tmp_path):
    m = manager(tmp_path)
    named = m.start("main", "alpha", key=("k", "hash"))
    finish(m, "cancelled")
    for _ in range(m.KEEP + 5):
        m.start("main", "alpha")
        finish(m, "cancelled")
    for m in (m, manager(tmp_path)):
        assert m.get(named.id).phase == "cancelled" and len(m.recent) == m.KEEP + 1
        assert m.answer_to(("k", "hash"))["swap"] == named.id


# --- who may be told no

def test_a_model_that_failed_to_load_three_times_in_an_hour_is_refused_unless_forced(two):
    two.rig.behave("spark1", "alpha", mode="oom")
    ids = [two.swap("alpha").json["id"] for _ in range(3)]
    got = two.swap("alpha")
    assert (got.status, got.code) == (409, "model_failing") and [f["swap"] for f in got.json["error"]["failures"]] == ids[::-1]
    assert "out of" in got.json["error"]["failures"][0]["message"].lower() and got.json["error"]["failures"][0]["remedy"] and int(got.headers["Retry-After"]) > 3000
    assert two.swap("alpha", dry_run=True).status == 200 and two.swap("beta").status == 200
    two.journaled(None)
    two.restart()
    assert two.swap("alpha").code == "model_failing"                                    # a restart forgets nothing
    two.rig.behave("spark1", "alpha", mode="ok")
    forced = two.post("/api/swap?wait=60&force=true", {"model": "alpha"})
    assert forced.status == 200 and forced.json["forced"]
    assert two.swap("beta").status == 200 and two.swap("alpha").status == 200           # it loaded: the count begins anew


def test_only_failed_loads_within_the_hour_count_for_the_breaker():
    def swap(n, phase="failed", ago=60, last="loading", model="m", **more):
        at = sc.utc(time.time() - ago)
        return sc.Swap(str(n), "main", model, phase=phase, phases=((last, at, 1.0), (phase, at, 0.0)), ended_at=at, error={"code": "x", "message": "x"}, touched=True, **more)
    count = lambda *swaps: len(sc.recent_failures(swaps, "m", time.time()))
    assert count(swap(1), swap(2), swap(3)) == 3
    assert count(swap(1), swap(2, ago=3700), swap(3, model="other"), swap(4, last="checking"), swap(5, "cancelled")) == 1
    assert count(swap(1), swap(2, "ready"), swap(3)) == 1


def test_an_automatic_swap_may_not_evict_what_just_came_and_people_may(tmp_path):
    m = manager(tmp_path)
    m.start("main", "alpha")
    finish(m)
    with pytest.raises(sc.Refused) as refused:
        m.start("main", "beta", automatic=True)
    assert (refused.value.status, refused.value.code) == (409, "serving_too_short") and 100 < int(refused.value.headers["Retry-After"]) <= 120
    m.start("main", "beta")
    finish(m)
    m.start("main", None)
    finish(m)
    m.start("main", "alpha", automatic=True)                # nothing is evicted
    finish(m)
    patient = manager(tmp_path, MIN_SERVING_SECONDS="0")
    patient.start("main", "beta", automatic=True)


# --- webhooks

class Receiver(threading.Thread):
    """A webhook receiver of a few lines: checks the signature, keeps what came."""

    def __init__(self, status=200, delay=0.0, secret=b"s3cret", headers="", context=None):
        super().__init__(daemon=True)
        self.sock, self.status, self.delay, self.secret, self.headers, self.context, self.got, self.bad = \
            socket.create_server(("127.0.0.1", 0)), status, delay, secret, headers, context, [], []
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.sock.getsockname()[1]}"
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                c, _ = self.sock.accept()
                threading.Thread(target=self.one, args=(c,), daemon=True).start()

    def one(self, c):
        with contextlib.suppress(OSError), c:
            c = self.context.wrap_socket(c, server_side=True) if self.context else c
            f = c.makefile("rb")
            first, headers = f.readline().decode(), http.client.parse_headers(f)
            body = f.read(int(headers["Content-Length"]))
            if headers["X-Spark-Signature"] != "sha256=" + hmac.new(self.secret, body, hashlib.sha256).hexdigest():
                self.bad.append(headers.items())
            self.got.append((first, headers, json.loads(body)))
            time.sleep(self.delay)
            c.sendall(f"HTTP/1.1 {self.status} X\r\nContent-Length: 0\r\n{self.headers}\r\n".encode())


def hooked(rig, start, tmp_path, urls, **env):
    p = start(rig_env(rig, tmp_path, WEBHOOK_URL=",".join(urls), WEBHOOK_SECRET="s3cret", **env),
              args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    p.rig = rig
    return p


def test_every_receiver_is_told_of_a_swaps_end_with_a_signature_that_an_independent_program_can_check(rig, start, tmp_path):
    a, b = Receiver(), Receiver()
    p = hooked(rig, start, tmp_path, [a.url + "/hook?x=1", b.url])
    assert p.swap("alpha", dry_run=True).status == 200 and p.swap("alpha", note="for the demo").status == 200
    rig.behave("spark1", "beta", mode="oom")
    mine = lock(p)
    failed = p.post("/api/swap?wait=60", {"model": "beta"}, headers=token(mine["token"])).json
    p.idle()
    until(lambda: len(a.got) == 3 and len(b.got) == 3)
    assert not a.bad and not b.bad
    first, headers, told = a.got[0]
    assert first == "POST /hook?x=1 HTTP/1.1\r\n" and headers["X-Spark-Event"] == "swap_complete" and re.fullmatch(r"[0-9a-f]{16}", headers["X-Spark-Delivery"])
    assert (told["event"], told["slot"], told["model"], told["from_model"], told["error"], told["holder"], told["forced"], told["note"]) == (
        "swap_complete", "main", "alpha", None, None, None, False, "for the demo")
    assert [x["phase"] for x in told["phases"]][-1] == "ready" and all(x["seconds"] is not None for x in told["phases"]) and told["started"] < told["finished"]
    told = a.got[1][2]
    assert (told["event"], told["id"], told["from_model"], told["holder"], told["error"]["code"]) == ("swap_failed", failed["id"], "alpha", "daily-vol", "out_of_memory")
    assert a.got[2][2]["rollback_of"] == failed["id"]
    rows = until(lambda: (r := p.get("/api/webhooks").json["deliveries"]) and all(x["outcome"] == "delivered" for x in r) and r)
    assert len(rows) == 6 and rows[0]["status"] == 200 and rows[0]["seconds"] is not None and all("hook" not in x["to"] for x in rows)
    assert "s3cret" not in json.dumps(p.get("/api/state").json) + p.said() and a.url not in json.dumps(p.get("/api/settings").json)


def test_a_dead_a_slow_and_a_redirecting_receiver_delay_nothing_and_are_told_apart(rig, start, tmp_path):
    trap, slow = Receiver(), Receiver(delay=30)
    away, good = Receiver(status=302, headers=f"Location: {trap.url}\r\n"), Receiver()
    with socket.create_server(("127.0.0.1", 0)) as s:
        dead = f"http://127.0.0.1:{s.getsockname()[1]}"
    p = hooked(rig, start, tmp_path, [slow.url, dead, away.url, good.url], WEBHOOK_EVENTS="lock_*")
    for _ in range(3):
        mine = lock(p)
        p.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    until(lambda: len(good.got) == 6)
    assert [told["event"] for _, _, told in good.got] == ["lock_acquired", "lock_released"] * 3 and len(slow.got) == 1
    assert good.got[0][2]["holder"] == "daily-vol" and "token" not in json.dumps([told for *_, told in good.got])
    rows = until(lambda: (r := p.get("/api/webhooks").json["deliveries"]) and any(x["outcome"] == "failed" and "within" in x["detail"] for x in r) and r)
    outcome = {url: {x["outcome"] for x in rows if x["to"] == url} for url in (dead, away.url, good.url)}
    assert outcome == {dead: {"failed"}, away.url: {"refused"}, good.url: {"delivered"}} and trap.got == []
    assert {row["detail"] for row in rows if row["outcome"] == "refused"} == {"it answered 302; redirects are not followed"}
    assert p.swap("alpha").status == 200 and len(good.got) == 6             # nobody asked for swaps here


def test_the_thread_of_a_receiver_that_hears_nothing_more_ends_and_comes_back(monkeypatch):
    monkeypatch.setattr(sc.Webhooks, "IDLE_S", 0.05)
    good = Receiver()
    hooks = sc.Webhooks(lambda: sc.parse_settings({"WEBHOOK_URL": good.url, "WEBHOOK_SECRET": "s3cret"}), sc.Hub())
    mine = lambda: [t for t in threading.enumerate() if t.name == "webhook"]
    for n in (1, 2):
        hooks.tell({"kind": "test", "at": "now"})
        until(lambda: len(good.got) == n and not mine() and not hooks._queues, what="the end of the thread")
    assert hooks.outcomes() == {"delivered": 2}


def test_a_listener_that_fails_does_not_hurt_who_tells(tmp_path):
    events = sc.Events(str(tmp_path / "events.jsonl"), sc.Hub())
    heard = []
    events.listeners += [lambda event, payload: 1 / 0, lambda event, payload: heard.append(event["kind"])]
    events.add("x", "y")
    assert heard == ["x"] and [e["kind"] for e in events.since(0)] == ["x"]
    hooks = sc.Webhooks(lambda: sc.parse_settings({"WEBHOOK_EVENTS": "*"}), sc.Hub())
    assert hooks.wants("lock_acquired") and not hooks.wants("dry_run")


def test_a_receiver_that_drips_its_answer_is_cut_off(monkeypatch):
    monkeypatch.setattr(sc.Webhooks, "LIMIT_S", 0.3)

    class Dripping(Receiver):
        def one(self, c):
            with contextlib.suppress(OSError), c:
                for n in range(200):
                    c.sendall(b" " if n else b"HTTP/1.1")
                    time.sleep(0.1)
    hooks = sc.Webhooks(lambda: sc.parse_settings({"WEBHOOK_URL": Dripping().url}), sc.Hub())
    hooks.tell({"kind": "test", "at": sc.utc()})
    until(lambda: hooks.deliveries()[0]["outcome"] == "failed", 5)


def test_a_receiver_that_never_catches_up_has_a_bounded_queue(tmp_path, monkeypatch):
    monkeypatch.setattr(sc.Webhooks, "QUEUE", 3)
    slow = Receiver(delay=30)
    hooks = sc.Webhooks(lambda: sc.parse_settings({"WEBHOOK_URL": slow.url, "WEBHOOK_EVENTS": "*"}), sc.Hub())
    for _ in range(10):
        hooks.tell({"kind": "x", "at": sc.utc()})
    assert [row["outcome"] for row in hooks.deliveries()].count("dropped") >= 6


def test_a_test_webhook_can_be_sent_and_says_what_came_of_it(start, tmp_path):
    (tmp_path / "none.yaml").touch()
    args, r = ("--models", str(tmp_path / "none.yaml"), "--services", str(tmp_path / "none.yaml")), Receiver()
    p = start(args=args)
    assert p.post("/api/webhooks/test").code == "no_webhook"
    p.kill()
    p.env = {"WEBHOOK_URL": f"ftp://x,{r.url}", "WEBHOOK_SECRET": "s3cret"}
    assert "WEBHOOK_URL: its value" in p.start().get("/api/state").json["warnings"][0]
    p.kill()
    p.env = {"WEBHOOK_URL": r.url, "WEBHOOK_SECRET": "s3cret"}
    got = p.start().post("/api/webhooks/test")
    assert got.status == 200 and got.json["deliveries"][0]["outcome"] == "delivered" and r.got[0][2]["event"] == "test" and not r.bad
    r.status = 500
    assert p.post("/api/webhooks/test").code == "not_delivered"


def test_a_receiver_whose_certificate_nobody_vouches_for_is_told_nothing(start, tmp_path):
    need(shutil.which("openssl"), "openssl")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(tmp_path / "k"), "-out", str(tmp_path / "c"), "-days", "2",
                    "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True, timeout=60)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c", tmp_path / "k")
    r = Receiver(context=context)
    p = start({"WEBHOOK_URL": r.url, "WEBHOOK_SECRET": "s3cret"}, args=("--demo",), wait=False)
    p.kill()
    p.args = ("--models", str(tmp_path / "none.yaml"), "--services", str(tmp_path / "none.yaml"))
    (tmp_path / "none.yaml").touch()
    row = p.start().post("/api/webhooks/test").json["error"]["deliveries"][0]
    assert row["outcome"] == "failed" and "CERTIFICATE" in row["detail"] and r.got == []
    p.kill()
    p.env["SSL_CERT_FILE"] = str(tmp_path / "c")
    assert p.start().post("/api/webhooks/test").status == 200 and len(r.got) == 1


# --- cron

@pytest.fixture
def zone(monkeypatch):
    def go(name):
        monkeypatch.setenv("TZ", name)
        time.tzset()
    yield go
    monkeypatch.undo()
    time.tzset()


def runs(expression, after, count=3):
    """The next local times of a cron expression, with the offset from UTC."""
    cron, at, out = sc.parse_cron(expression), datetime.fromisoformat(after).timestamp(), []
    for _ in range(count):
        at = sc.next_run(cron, at)
        out.append(datetime.fromtimestamp(at).astimezone().isoformat())
    return out


BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"


@pytest.mark.parametrize("expression,after,expected", [
    ("0 6 * * *", "2026-11-23T05:59:59", ["2026-11-23T06:00", "2026-11-24T06:00", "2026-11-25T06:00"]),
    ("*/20 9-10 * * mon-fri", "2026-11-20T10:20:00", ["2026-11-20T10:40", "2026-11-23T09:00", "2026-11-23T09:20"]),
    ("0 0 29 2 *", "2026-01-01T00:00:00", ["2028-02-29T00:00", "2032-02-29T00:00", "2036-02-29T00:00"]),
    ("30 4 1,15 * 5", "2026-11-01T05:00:00", ["2026-11-06T04:30", "2026-11-13T04:30", "2026-11-15T04:30"]),        # either day field
    ("0 12 */10 * 7", "2026-11-01T13:00:00", ["2027-01-31T12:00", "2027-02-21T12:00", "2027-03-21T12:00"]),         # a * makes it both
    ("@weekly", "2026-11-23T00:00:00", ["2026-11-29T00:00", "2026-12-06T00:00", "2026-12-13T00:00"]),
    ("0 0 1 JAN,jul *", "2026-11-23T00:00:00", ["2027-01-01T00:00", "2027-07-01T00:00", "2028-01-01T00:00"]),
    ("5-10/5 0 31 * *", "2026-10-31T00:05:00", ["2026-10-31T00:10", "2026-12-31T00:05", "2026-12-31T00:10"]),
    # spring: 02:00 becomes 03:00 on 2027-03-28; autumn: 03:00 becomes 02:00 on 2026-10-25
    ("30 2 * * *", "2027-03-27T12:00:00", ["2027-03-28T03:00+02:00", "2027-03-29T02:30+02:00", "2027-03-30T02:30+02:00"]),
    ("*/30 * * * *", "2027-03-28T01:15:00", ["2027-03-28T01:30+01:00", "2027-03-28T03:00+02:00", "2027-03-28T03:30+02:00"]),
    ("30 2 * * *", "2026-10-24T12:00:00", ["2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00", "2026-10-27T02:30+01:00"]),
    ("30 * * * *", "2026-10-25T01:45:00", ["2026-10-25T02:30+02:00", "2026-10-25T02:30+01:00", "2026-10-25T03:30+01:00"]),
    ("0 3 * * *", "2026-10-25T00:00:00", ["2026-10-25T03:00+01:00", "2026-10-26T03:00+01:00", "2026-10-27T03:00+01:00"]),
])
def test_the_next_runs_of_a_cron_expression_are_what_cron_would_do(zone, expression, after, expected):
    zone(BERLIN)
    got = runs(expression, after)
    assert [g[:16] + g[19:] if "+" in e else g[:16] for g, e in zip(got, expected)] == expected


@pytest.mark.parametrize("tz,expression,after,expected", [
    ("<+1030>-10:30<+11>-11,M10.1.0,M4.1.0", "15 2 * * *", "2026-10-03T12:00:00", "2026-10-04T02:30:00+11:00"),     # Lord Howe: half an hour
    ("CST5CDT,M3.2.0/0,M11.1.0/1", "@daily", "2026-03-07T12:00:00", "2026-03-08T01:00:00-04:00"),                   # Havana: midnight is skipped
    ("CST5CDT,M3.2.0/0,M11.1.0/1", "@daily", "2026-10-31T12:00:00", "2026-11-01T00:00:00-04:00"),                   # and comes twice
])
def test_half_hour_changes_and_a_skipped_midnight_lose_no_run(zone, tz, expression, after, expected):
    zone(tz)
    assert datetime.fromtimestamp(sc.next_run(sc.parse_cron(expression), datetime.fromisoformat(after).timestamp())).astimezone().isoformat() == expected


def test_random_cron_expressions_agree_with_a_walk_through_every_minute(zone):
    """The oracle steps through real time minute by minute and compares each field as crontab(5) words it."""
    zone("UTC")
    dice = random.Random(5)

    def field(low, high):
        a, b = sorted((dice.randint(low, high), dice.randint(low, high)))
        return dice.choice(["*", f"*/{dice.randint(1, high)}", str(a), f"{a}-{b}", f"{a}-{b}/{dice.randint(1, 5)}", f"{a},{b}"])

    def allows(text, low, high, value, also=None):
        for part in text.split(","):
            base, _, step = part.partition("/")
            a, b = (low, high) if base == "*" else (int(base.split("-")[0]), int(base.split("-")[-1]))
            if any(a <= v <= b and (v - a) % int(step or 1) == 0 for v in {value, value if also is None else also}):
                return True
        return False
    compared = 0
    while compared < 150:
        f = [field(0, 59), field(0, 23), field(1, 31), field(1, 12), field(0, 7)]
        at = 60 * dice.randint(29_000_000, 30_000_000)
        try:
            got = sc.next_run(sc.parse_cron(" ".join(f)), at)
        except ValueError:
            continue
        for t in range(at + 60, at + 60 * 24 * 60 * 3, 60):
            w = time.gmtime(t)
            days = allows(f[2], 1, 31, w.tm_mday), allows(f[4], 0, 7, (w.tm_wday + 1) % 7, 7 if w.tm_wday == 6 else None)
            day = any(days) if f[2][0] != "*" and f[4][0] != "*" else all(days)
            if allows(f[0], 0, 59, w.tm_min) and allows(f[1], 0, 23, w.tm_hour) and allows(f[3], 1, 12, w.tm_mon) and day:
                assert got == t, f
                break
        else:
            assert got is None or got > at + 60 * 24 * 60 * 3 - 60, f
        compared += 1


@pytest.mark.parametrize("expression", ["", "* * * *", "* * * * * *", "60 * * * *", "* 24 * * *", "* * 0 * *", "* * 32 * *", "* * * 13 *", "* * * * 8", "*/0 * * * *",
                                        "5/10 * * * *", "10-5 * * * *", "a * * * *", "* * * foo *", "1,,2 * * * *", "-5 * * * *", "@reboot", "0 0 30 2 *", "0 0 31 4,6 *", "٣ * * * *", "1" * 500])
def test_what_is_no_cron_expression_is_refused(bare, expression):
    with pytest.raises(ValueError):
        sc.cron_text(expression)
    got = bare.post("/api/schedule", {"id": "x", "cron": expression})
    assert (got.status, got.json["error"]["field"]) == (422, "cron") and bare.get("/api/schedule").json["schedules"] == []


# --- schedules and jobs

def test_schedules_are_kept_shown_replaced_and_never_run(bare):
    entry = {"id": "daily-vol.1", "name": "Vol surface", "cron": "0 6 * * 1-5", "model": "m", "duration_minutes": 30, "owner": "quant", "note": "<b>x</b>"}
    got = bare.post("/api/schedule", entry)
    assert got.status == 201 and {k: got.json[k] for k in entry} == entry and got.json["next_run"].endswith("00.000Z") and got.json["late"] is False
    bare.post("/api/schedule", {"id": "given", "next_run": "2030-01-01T06:00:00+01:00"})
    bare.restart()
    rows = {row["id"]: row for row in bare.get("/api/schedule").json["schedules"]}
    assert rows["given"]["next_run"] == "2030-01-01T05:00:00.000Z" and rows["daily-vol.1"]["note"] == "<b>x</b>"
    assert bare.post("/api/schedule", {"id": "given", "cron": "@daily", "last_run": "2026-01-01T00:00:00Z", "last_status": "ok", "runs": 7}).status == 200
    row = next(row for row in bare.get("/api/state").json["schedules"] if row["id"] == "given")
    assert (row["runs"], row["last_status"]) == (7, "ok")
    assert bare.call("DELETE", "/api/schedule/given").status == 200
    got = bare.call("DELETE", "/api/schedule/daily-vol")
    assert (got.status, got.code, got.json["error"]["nearest"]) == (404, "unknown_schedule", "daily-vol.1")


@pytest.mark.parametrize("body,field", [({}, "id"), ({"id": "a b"}, "id"), ({"id": "x" * 65}, "id"), ({"id": "../x"}, "id"), ({"id": "x", "next_run": "tomorrow"}, "next_run"),
                                        ({"id": "x", "next_run": "2026-01-01T00:00:00"}, "next_run"), ({"id": "x", "duration_minutes": "5"}, "duration_minutes"),
                                        ({"id": "x", "runs": [1]}, "runs"), ({"id": "x", "last_run": "2026-01-31\n06:00:00Z"}, "last_run"),
                                        ({"id": "x", "last_run": "0001-01-01T00:00:00+14:00"}, "last_run"), ({"id": "x", "note": "a\u2028b"}, "note"), ({"id": "x", "command": "rm -rf"}, "command"), ({"id": "x", "note": "n" * 501}, "note")])
def test_a_bad_schedule_names_its_field(bare, body, field):
    got = bare.post("/api/schedule", body)
    assert (got.status, got.json["error"]["field"]) == (422, field)


def test_a_schedule_whose_run_was_not_reported_is_late():
    now = sc.parse_utc("2026-11-23T12:00:00Z")
    due = lambda **entry: sc.schedule_due({"registered_at": "2026-11-01T00:00:00Z", **entry}, now)
    hourly, at = {"cron": "0 * * * *"}, sc.parse_utc
    assert due(**hourly) == (at("2026-11-23T13:00:00Z"), False)                                         # it never reports: nobody can tell
    assert due(**hourly, last_run="2026-11-23T12:00:00Z")[1] is False and due(**hourly, last_run="2026-11-23T11:00:20Z")[1] is False
    assert due(**hourly, last_run="2026-11-23T10:00:20Z") == (at("2026-11-23T13:00:00Z"), True)
    assert due(next_run="2026-11-23T11:50:00Z") == (at("2026-11-23T11:50:00Z"), True) and due(next_run="2026-11-23T11:58:00Z")[1] is False
    assert due(next_run="2026-11-23T11:50:00Z", last_run="2026-11-23T11:51:00Z")[1] is False and due() == (None, False)


def test_conflicts_are_found_among_many_and_each_pair_is_told_once():
    day = 86400
    wishes = [(f"s{n % 200}", "main", f"m{n % 200 // 20}", n, n + 7 * day) for n in range(20_000)]
    assert len(sc.find_conflicts(wishes)) >= 50
    same = [(f"s{n % 50}", "main", "m", n, n + day) for n in range(5_000)]
    assert sc.find_conflicts(same) == []
    twice = sc.find_conflicts([("a", "main", "x", 0, 60), ("b", "main", "y", 30, 90), ("a", "main", "x", 100, 160), ("b", "main", "y", 130, 190), ("c", "other", "z", 0, 500)])
    assert [c["ids"] for c in twice] == [["a", "b"]] and twice[0]["at"] == sc.utc(30)


def test_two_jobs_that_want_different_models_at_once_are_marked(two):
    two.post("/api/schedule", {"id": "vol", "cron": "0 6 * * *", "model": "alpha", "duration_minutes": 30})
    two.post("/api/schedule", {"id": "same", "cron": "10 6 * * *", "model": "alpha"})
    two.post("/api/schedule", {"id": "after", "cron": "30 6 * * *", "model": "beta"})
    assert two.get("/api/schedule").json["conflicts"] == []
    two.post("/api/jobs", {"id": "mine", "kind": "swap", "model": "beta", "cron": "15 6 * * *"})
    got = two.get("/api/schedule").json
    assert [c["ids"] for c in got["conflicts"]] == [["vol", "job mine"]] and "two jobs want different models at 06:15" in got["conflicts"][0]["text"]
    assert [bool(row["conflicts"]) for row in got["schedules"]] == [True, False, False]
    two.post("/api/jobs", {"id": "mine", "kind": "swap", "model": "beta", "cron": "15 6 * * *", "enabled": False})
    assert two.get("/api/state").json["conflicts"] == []


@pytest.mark.parametrize("body,status,words", [
    ({"id": "x", "kind": "swap", "cron": "@daily"}, 422, "model is needed"), ({"id": "x", "kind": "dance", "cron": "@daily"}, 422, "one of swap"),
    ({"id": "x", "kind": "swap", "cron": "@daily", "model": "alpa"}, 404, "alpha"), ({"id": "x", "kind": "restart", "cron": "@daily", "service": "nope"}, 404, "no service"),
    ({"id": "x", "kind": "health"}, 422, "cron is needed"), ({"kind": "health", "cron": "@daily"}, 422, "id is needed"), ({"id": "x", "kind": "swap", "cron": "@daily", "model": "alpha", "slot": "third"}, 404, "no slot"),
])
def test_a_bad_job_is_refused_in_words(two, body, status, words):
    got = two.post("/api/jobs", body)
    assert got.status == status and words in got.json["error"]["message"] and two.get("/api/jobs").json == {"jobs": []}


def due(program, ago=5, **job):
    """Stop the program, make the job due so long ago, and start it again."""
    program.journaled(None) if (program.data / "swap.json").exists() else None
    program.kill()
    path = program.data / "jobs.json"
    entries = json.loads(path.read_text())["entries"] if path.exists() else {}
    entries[job["id"]] = {"cron": "@yearly", **entries.get(job["id"], {}), **job, "runs": [], "due": time.time() - ago}
    path.write_text(json.dumps({"entries": entries}))
    program.start()


def ran(program, key, seconds=30):
    """Wait for the end of the job's last run -> that run."""
    job = lambda: next(j for j in program.get("/api/jobs").json["jobs"] if j["id"] == key)
    return until(lambda: (j := job())["runs"] and not j["running"] and j["runs"][0]["outcome"] != "running" and j["runs"][0], seconds, "the end of the job")


def test_a_swap_job_takes_the_lock_swaps_and_gives_it_back(two):
    due(two, id="morning", kind="swap", model="alpha", note="for the desk")
    run = ran(two, "morning")
    assert run["outcome"] == "ok" and "alpha serves" in run["detail"]
    swap = two.get(f"/api/swap/{run['swap']}").json
    assert (swap["phase"], swap["holder"], swap["note"], swap["automatic"]) == ("ready", "job morning", "for the desk", True)
    assert two.get("/api/swap/lock").json == {"locked": False}
    due(two, id="morning")
    assert "served already" in ran(two, "morning")["detail"] and two.get("/api/swap/lock").json == {"locked": False}
    job = two.get("/api/jobs").json["jobs"][0]
    assert job["next_run"].endswith("-01-01T00:00:00.000Z") and {"job_ok", "swap_complete"} <= set(kinds(two))


def test_a_job_waits_for_the_lock_and_for_the_least_time_of_serving_like_anyone_else(two):
    mine = lock(two, ttl=600)
    due(two, id="j", kind="swap", model="alpha", wait=0.5)
    run = ran(two, "j")
    assert run["outcome"] == "failed" and "daily-vol holds the lock" in run["detail"]
    due(two, id="j", kind="swap", model="alpha", wait=60)
    until(lambda: two.get("/api/swap/lock").json["queue"] == 1)
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    assert ran(two, "j")["outcome"] == "ok"
    due(two, id="j", kind="swap", model="beta", wait=0)
    run = ran(two, "j")
    assert run["outcome"] == "failed" and "MIN_SERVING_SECONDS" in run["detail"] and serves(two)["model"] == "alpha"


def test_a_swap_job_goes_on_across_a_restart_and_another_is_told_interrupted(two):
    two.rig.behave("spark1", "alpha", load=3)
    due(two, id="j", kind="swap", model="alpha")
    two.journaled("loading")
    two.restart()
    assert ran(two, "j")["outcome"] == "ok" and two.get("/api/swap/lock").json == {"locked": False}
    two.rig.behave("spark1", "alpha", warm_delay=30)
    due(two, id="w", kind="warm", model="alpha")
    until(lambda: next(j for j in two.get("/api/jobs").json["jobs"] if j["id"] == "w")["running"])
    two.restart()
    assert ran(two, "w")["outcome"] == "interrupted"


def test_warm_and_health_ask_the_engine_and_say_what_is_wrong(two):
    for kind, extra in (("warm", {"model": "alpha"}), ("health", {})):
        due(two, id=kind, kind=kind, **extra)
        assert (ran(two, kind)["outcome"]) == ("failed" if kind == "warm" else "ok")
    assert two.swap("alpha").status == 200
    due(two, id="warm")
    assert ran(two, "warm")["outcome"] == "ok" and "alpha answered" in ran(two, "warm")["detail"]
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    Path(two.dir / "services.yaml").write_text(f"services: {{side: {{kind: http, host: spark2, port: {port}, health: /up}}, off: {{kind: http, host: spark2, port: 1}}}}")
    two.env["DISABLED_SERVICES"] = "off"
    due(two, id="health")
    run = ran(two, "health")
    assert run["outcome"] == "failed" and run["detail"] == "side: connection refused"
    rows = {row["name"]: row for row in two.get("/api/health/deep").json["services"]}
    assert set(rows) == {"main", "side"} and rows["main"]["ok"] and not rows["side"]["ok"]


def test_a_restart_job_restarts_the_services_container_as_its_own_user(two):
    two.rig.sh("spark2", "docker run -d --name asr busybox sleep infinity")
    Path(two.dir / "services.yaml").write_text("services: {asr: {kind: asr, host: spark2, port: 8000, container: asr}, bare: {kind: http, host: spark2, port: 1}, "
                                               "main-vllm: {kind: vllm, host: spark1, port: 1, container: vllm_node}}")
    due(two, id="r", kind="restart", service="asr")
    assert ran(two, "r")["outcome"] == "ok" and "asr on spark2 was restarted" in ran(two, "r")["detail"]
    assert any(c["argv"][:2] == ["docker", "restart"] or "docker restart" in str(c) for c in two.rig.calls("spark2"))
    for name, status, code in (("bare", 409, "no_container"), ("main-vllm", 409, "slot_engine"), ("asd", 404, "unknown_service")):
        got = two.post(f"/api/services/{name}/restart")
        assert (got.status, got.code) == (status, code)
    mine = lock(two)
    assert two.post("/api/services/asr/restart").code == "swap_locked" and two.post("/api/services/asr/restart?force=true").status == 200
    assert two.post("/api/services/asr/restart", headers=token(mine["token"])).status == 200
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    two.post("/api/swap", {"model": "alpha"})
    assert two.post("/api/services/asr/restart").code == "swap_running"
    two.idle()
    two.rig.sh("spark2", "docker rm -f asr")
    got = two.post("/api/services/asr/restart")
    assert (got.status, got.code) == (502, "restart_failed") and "No such container" in got.json["error"]["message"]


def test_a_restart_is_streamed_and_nobody_swaps_meanwhile(two):
    two.rig.sh("spark2", "docker run -d --name asr busybox sh -c 'echo up; exec sleep 60'")
    Path(two.dir / "services.yaml").write_text("services: {asr: {kind: asr, host: spark2, port: 8000, container: asr}}")
    until(lambda: two.get("/api/services/asr/logs").status == 200)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        said = pool.submit(two.post, "/api/services/asr/restart?follow=true")
        held = until(lambda: (got := two.get("/api/swap/lock").json)["locked"] and got)
        assert held["holder"] == "the restart of asr" and two.post("/api/swap", {"model": "alpha"}).code == "swap_locked"
        assert two.post("/api/services/asr/restart").code == "swap_locked"
        got = said.result(60)
    lines = got.body.decode().splitlines()
    assert got.headers["Content-Type"].startswith("text/plain") and len(lines) > 2 and lines[-1] == "-- container asr on spark2 was restarted", lines
    assert "up" in lines and two.get("/api/swap/lock").json == {"locked": False}
    mine = lock(two, ttl=5)                     # whoever holds the lock keeps it for as long as it takes
    assert two.post("/api/services/asr/restart", headers=token(mine["token"])).status == 200 and two.get("/api/swap/lock").json["expires_in"] > 60
    assert two.post("/api/services/asr/restart?follow=true").code == "swap_locked"
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    two.rig.sh("spark2", "docker rm -f asr")
    got = two.post("/api/services/asr/restart?follow=true")
    assert (got.status, got.code) == (502, "restart_failed") and two.get("/api/swap/lock").json == {"locked": False}


def test_a_job_that_was_deleted_while_it_waits_does_nothing(two):
    mine = lock(two)
    due(two, id="j", kind="swap", model="alpha", wait=60)
    until(lambda: two.get("/api/swap/lock").json["queue"] == 1)
    assert two.call("DELETE", "/api/jobs/j").status == 200
    until(lambda: two.get("/api/swap/lock").json["queue"] == 0)
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    until(lambda: "job_failed" in kinds(two))
    assert two.get("/api/swap").json == {"running": None, "recent": []} and two.get("/api/swap/lock").json == {"locked": False}


def test_a_job_missed_while_sparkctl_was_away_runs_once_or_not_as_it_says(two):
    due(two, ago=7200, id="skips", kind="health", cron="*/5 * * * *")
    run = ran(two, "skips")
    assert run["outcome"] == "skipped" and "sparkctl did not run" in run["detail"]
    due(two, ago=7200, id="runs", kind="health", cron="*/5 * * * *", missed="run")
    assert ran(two, "runs")["outcome"] == "ok"
    assert len(next(j for j in two.get("/api/jobs").json["jobs"] if j["id"] == "runs")["runs"]) == 1
    due(two, ago=5, id="off", kind="health", enabled=False)
    due(two, ago=5, id="on", kind="health")
    assert ran(two, "on")["outcome"] == "ok"
    assert next(j for j in two.get("/api/jobs").json["jobs"] if j["id"] == "off")["runs"] == []


def test_a_job_never_overlaps_itself(tmp_path):
    begun, end = [], threading.Event()
    register = sc.Register(str(tmp_path / "jobs.json"), "job", {**sc.JOB, **sc.JOB_STATE}, (), sc.Hub(), print)
    jobs = sc.Jobs(register, {"health": lambda job, tell, swap: begun.append(1) or str(end.wait(20))}, lambda *a, **k: None)
    jobs.put({"id": "slow", "kind": "health", "cron": "* * * * *"})
    for _ in range(3):
        jobs._due(register.entries["slow"], register.entries["slow"]["due"] + 1)
    until(lambda: begun)
    outcomes = [run["outcome"] for run in register.entries["slow"]["runs"]]
    assert len(begun) == 1 and outcomes == ["skipped", "skipped", "running"] and "not over" in register.entries["slow"]["runs"][0]["detail"]
    for _ in range(jobs.KEEP):                              # the one that runs is never pushed out
        jobs._due(register.entries["slow"], register.entries["slow"]["due"] + 1)
    assert [run["outcome"] for run in register.entries["slow"]["runs"]] == ["skipped"] * jobs.KEEP + ["running"]
    end.set()
    until(lambda: not jobs.shown()[0]["running"])
    assert register.entries["slow"]["runs"][-1]["outcome"] == "ok"


def test_when_the_clock_is_set_jobs_are_due_by_the_new_time(tmp_path, monkeypatch):
    register = sc.Register(str(tmp_path / "jobs.json"), "job", {**sc.JOB, **sc.JOB_STATE}, (), sc.Hub(), print)
    jobs, real = sc.Jobs(register, {}, lambda *a, **k: None), time.time
    monkeypatch.setattr(sc.time, "time", lambda: real() + 10 * 86400)
    monkeypatch.setattr(sc.Jobs, "LOOK_S", 0)
    jobs._look()
    jobs.put({"id": "j", "kind": "health", "cron": "0 * * * *"})
    assert register.entries["j"]["due"] > real() + 9 * 86400
    monkeypatch.setattr(sc.time, "time", real)
    jobs._look()
    assert register.entries["j"]["due"] < real() + 3601 and register.entries["j"]["runs"] == []


# --- audit, loss, kill -9

def test_the_audit_log_says_who_did_what_and_survives(two):
    mine = lock(two)
    two.post("/api/swap", {"model": "alpha"}, headers=token(mine["token"]))
    two.phase("loading", "launching", "warming")
    two.call("DELETE", f"/api/swap/{two.running()['id']}?force=true")
    two.idle()
    two.call("DELETE", "/api/swap/lock", headers=token(mine["token"]))
    lock(two, "short", ttl=1)
    until(lambda: kinds(two)[0] == "lock_expired")
    Path(two.dir / "models.yaml").write_text(CATALOG.replace("LOCAL", str(two.rig.local)) + "  extra: {repo: org/extra}\n")
    until(lambda: "config_changed" in kinds(two))
    two.restart(signal.SIGTERM)
    events = two.get("/api/events").json["events"]
    told = {e["kind"]: e for e in events}
    assert {"lock_acquired", "lock_released", "lock_expired", "lock_override", "swap_started", "swap_cancelled", "config_changed", "started", "stopped"} <= set(told)
    assert told["swap_started"]["holder"] == "daily-vol" and told["swap_started"]["client"] == "127.0.0.1" and told["lock_override"]["client"] == "127.0.0.1"
    assert [e["n"] for e in events] == sorted((e["n"] for e in events), reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", e["at"]) for e in events)


def state_files(tmp_path):
    """A data directory in which everything is kept -> {name: content}."""
    m = manager(tmp_path)
    m.start("main", "alpha", key=("k", "hash"))
    m.acquire("a", 600, note="n")
    hub = sc.Hub()
    sc.Register(str(tmp_path / "schedules.json"), "schedule", sc.SCHEDULE, (), hub, print).change("s", lambda old: {"id": "s", "cron": "@daily", "runs": 3})
    sc.Register(str(tmp_path / "jobs.json"), "job", {**sc.JOB, **sc.JOB_STATE}, (), hub, print).change("j", lambda old: {
        "id": "j", "kind": "health", "cron": "@daily", "due": 1.5, "runs": [{"started_at": sc.utc(), "outcome": "ok", "detail": "x"}]})
    sc.Events(str(tmp_path / "events.jsonl"), hub).add("x", "y", who="z")
    return {name: (tmp_path / name).read_bytes() for name in ("swap.json", "lock.secret", "schedules.json", "jobs.json", "events.jsonl")}


def load_all(tmp_path):
    """Everything that a start reads -> (manager, schedules, jobs, events, warnings)."""
    m, warnings = manager(tmp_path), []
    schedules = sc.Register(str(tmp_path / "schedules.json"), "schedule", sc.SCHEDULE, (), sc.Hub(), warnings.append)
    jobs = sc.Register(str(tmp_path / "jobs.json"), "job", {**sc.JOB, **sc.JOB_STATE}, ("kind", "cron", "due", "runs"), sc.Hub(), warnings.append)
    sc.Schedules(schedules, jobs).shown()
    sc.Jobs(jobs, {}, None).shown()
    return m, schedules, jobs, sc.Events(str(tmp_path / "events.jsonl"), sc.Hub()), m.warnings + warnings


@pytest.mark.parametrize("name", ["swap.json", "lock.secret", "schedules.json", "jobs.json", "events.jsonl"])
def test_a_state_file_torn_at_any_byte_never_stops_the_start_and_what_was_lost_is_told(tmp_path, monkeypatch, name):
    monkeypatch.setattr(sc.os, "fsync", lambda fd: None)
    whole, quiet = state_files(tmp_path), []
    garbage = [b"\0" * 50, b"[]", b"{}", b"null", b'{"entries": 7}', b'{"entries": {"s": 7, "j": []}}', b'{"lease": {"holder": 7}}', b'{"fence": "x"}', b'{"keys": {"k": 1}}',
               b'{"entries": {"s": {"id": "t"}, "j": {"id": "j", "kind": "swap", "cron": "@daily", "due": "x", "runs": []}}}', b'{"n": 1}', os.urandom(200), b"{" * 100000]
    for content in [whole[name][:n] for n in range(len(whole[name]))] + garbage:
        for other, data in whole.items():
            (tmp_path / other).write_bytes(data if other != name else content)
        m, schedules, jobs, events, warnings = load_all(tmp_path)
        lost = name == "lock.secret" and len(content) != 32      # and the lock with it
        kept = bool(m.book.running and (m.book.lease or lost)), "s" in schedules.entries, "j" in jobs.entries
        expected = {"swap.json": 0, "schedules.json": 1, "jobs.json": 2}.get(name)
        assert all(k for i, k in enumerate(kept) if i != expected)
        if expected is not None and not kept[expected] and not warnings:
            quiet.append(content)
        assert not lost or any("lock.secret" in w for w in warnings) and not m.book.lease
        for left in tmp_path.glob("*.bad-*"):
            left.unlink()
    assert quiet in ([], [b"{}"])


@pytest.mark.parametrize("seed", range(4))
def test_fifty_random_kills_resurrect_and_lose_nothing(two, seed):
    """Locks, schedules and swaps go on while the program is killed; what was answered must be there afterwards."""
    dice, held, entries, fence, shown = random.Random(seed), None, set(), 0, None
    two.rig.behave("spark1", "*", load=0.1)
    for n in range(50):
        stop = threading.Timer(dice.uniform(0.0, 0.12), two.process.kill)
        stop.start()
        maybe = None                    # an operation whose answer did not arrive: it may have happened or not
        with contextlib.suppress(OSError, http.client.HTTPException):
            while True:
                choice = dice.choice(("lock", "free", "schedule", "drop", "swap"))
                maybe = (choice, f"s{n}")
                if choice == "lock" and not held:
                    got = two.post("/api/swap/lock", {"holder": f"h{n}", "ttl": 3600})
                    assert got.status == 201 and got.json["fence"] > fence, got.body
                    held, fence = got.json, got.json["fence"]
                elif choice == "free" and held:
                    assert two.call("DELETE", "/api/swap/lock", headers=token(held["token"])).status == 200
                    held = None
                elif choice == "schedule":
                    assert two.post("/api/schedule", {"id": f"s{n}", "cron": "@daily"}).status in (200, 201)
                    entries.add(f"s{n}")
                elif choice == "drop" and entries:
                    maybe = (choice, gone := dice.choice(sorted(entries)))
                    assert two.call("DELETE", f"/api/schedule/{gone}").status == 200
                    entries.discard(gone)
                elif choice == "swap":
                    got = two.post("/api/swap", {"model": dice.choice(("alpha", "beta")), "restart": True}, headers=token(held["token"]) if held else {})
                    assert got.status in (202, 409), got.body
                maybe = None
        stop.join()
        two.kill()
        two.start()
        shown, kept = two.get("/api/swap/lock").json, {row["id"] for row in two.get("/api/schedule").json["schedules"]}
        if maybe and maybe[0] == "lock" and not held and shown["locked"]:
            assert shown["fence"] > fence and shown["holder"] == f"h{n}"
            fence = shown["fence"]
            assert two.call("DELETE", "/api/swap/lock?force=true").status == 200        # its token was never told
        elif maybe and maybe[0] == "free" and not shown["locked"]:
            held = None
        else:
            assert shown["locked"] == bool(held) and (not held or shown["fence"] == held["fence"]), (maybe, shown, held)
        unsure = {maybe[1]} if maybe and maybe[0] in ("schedule", "drop") else set()
        assert kept - unsure == entries - unsure
        entries = kept
        assert not [w for w in two.get("/api/state").json["warnings"] if "root" not in w]
    swaps = two.get("/api/swap").json
    assert len({s["id"] for s in swaps["recent"]}) == len(swaps["recent"])
    two.idle()


# === 11 weights ===============================================================

TOKEN = "hf_sEcReT0123456789abcdef"


@pytest.fixture
def store(two, tmp_path):
    """`two`, with the models new (solo) and newwide (cluster), which Hugging Face has and no Spark."""
    (tmp_path / "models.yaml").write_text((tmp_path / "models.yaml").read_text() + """
  new: {repo: org/new}
  newwide: {repo: org/newwide, mode: cluster, size_gb: 0.0002}
  twin: {repo: org/beta}
""")
    for repo in ("org/new", "org/newwide"):
        two.rig.publish(repo)
    until(lambda: two.get("/api/models/newwide").status == 200)
    return two


def slow(program, seconds=0.1):
    for name in program.rig.sparks:
        program.rig.control(name, "hf_pause", seconds)
        program.rig.control(name, "rsync_pause", seconds)


def transfer(program, *states, model="new", seconds=30, **facts):
    """Wait until the last transfer of the model is in one of these states, and as the facts say -> it."""
    def found():
        rows = program.get("/api/state").json["transfers"]         # which is cheap; those that are over are told by the disks
        rows = rows if "running" in states else [] if any(t["model"] == model for t in rows) else program.get("/api/disk").json["transfers"]
        t = next((t for t in rows if t["model"] == model), None)
        return t and t["state"] in states and all(t[k] == v for k, v in facts.items()) and t
    return until(found, seconds, f"a transfer of {model} that is {states} {facts}")


def disk_of(program, spark="spark1"):
    return next(h for h in program.get("/api/disk").json["hosts"] if h["host"] == spark)


def repos_of(program, spark="spark1"):
    return {row["repo"] or row["name"]: row for row in disk_of(program, spark)["repos"]}


def downloads(program, spark="spark1"):
    path = program.rig.spark(spark) / "hf.log"
    return [c for c in map(json.loads, path.read_text().splitlines() if path.exists() else []) if c["argv"][:1] == ["download"]]


def test_a_download_gets_to_both_sparks_and_its_progress_is_seen(store):
    slow(store, 0.15)
    r = store.post("/api/models/newwide/download")
    assert r.status == 202 and r.json["state"] == "running" and r.json["hosts"] == ["spark1", "spark2"]
    seen, now, version = [], {}, store.get("/api/state").json["version"]
    while not seen or now["transfers"]:
        now = store.get(f"/api/state?since={version}&wait=10").json
        version = now["version"]
        seen += [(t["phase"], t["host"], t["bytes"], t["bytes_per_second"], t["eta_seconds"]) for t in now["transfers"]]
    t = transfer(store, "complete", model="newwide")
    assert {s[:2] for s in seen} == {("download", "spark1"), ("copy", "spark2")}
    for phase in ("download", "copy"):
        part = [s for s in seen if s[0] == phase]
        assert 0 < part[-1][2] <= t["total_bytes"] + 1000 and any(s[3] > 0 and s[4] for s in part) and len({s[2] for s in part}) > 1, seen
    for spark in store.rig.sparks:
        row = repos_of(store, spark)["org/newwide"]
        assert row["complete"] and row["models"] == ["newwide"] and row["bytes"] == t["bytes"] > 200_000
    call, = downloads(store)
    assert call["env"]["HF_HUB_DISABLE_SHARED_BLOBS"] == "1" and not downloads(store, "spark2") and call["program"] == "uvx"
    assert kinds(store)[:2] == ["download_complete", "download_started"] and "127.0.0.1" in store.get("/api/events").json["events"][1]["text"]
    again = store.post("/api/models/newwide/download")
    assert again.status == 200 and "nothing to do" in again.json["note"] and len(downloads(store)) == 1
    assert store.swap("newwide").status == 200


def test_a_model_that_downloads_stays_and_a_transfer_that_failed_is_told_with_its_remedy(store):
    assert store.post("/api/models", {"key": "mine", "repo": "org/mine"}).status == 201
    store.rig.publish("org/mine")
    slow(store, 0.3)
    assert store.post("/api/models/mine/download").status == 202
    got = store.call("DELETE", "/api/models/mine")
    assert (got.status, got.code) == (409, "transfer_running") and "DELETE /api/models/mine/download" in got.json["error"]["message"]
    store.call("DELETE", "/api/models/mine/download")
    transfer(store, "cancelled", model="mine")
    assert store.call("DELETE", "/api/models/mine").status == 200
    store.post("/api/models", {"key": "nowhere", "repo": "org/nowhere"})
    store.post("/api/models/nowhere/download")
    failed = until(lambda: store.get("/api/state").json["failed_transfers"])
    assert [(t["model"], t["state"], t["error"]["code"]) for t in failed] == [("nowhere", "failed", "repo_not_found")] and failed[0]["error"]["remedy"]


def test_a_cancelled_download_ends_on_the_spark_and_can_be_begun_again(store):
    slow(store, 0.3)
    store.post("/api/models/new/download")
    until(lambda: list(store.rig.hub("spark1", "org/new").glob("blobs/*.incomplete")))
    assert store.call("DELETE", "/api/models/new/download").status == 202
    t = transfer(store, "cancelled")
    pid, = (c["pid"] for c in downloads(store))
    until(lambda: not alive(pid))
    assert list(store.rig.hub("spark1", "org/new").glob("blobs/*.incomplete")) and not repos_of(store)["org/new"]["complete"]
    assert "cancelled it" in t["note"] and store.call("DELETE", "/api/models/new/download").code == "no_transfer"
    slow(store, 0)
    store.post("/api/models/new/download")
    transfer(store, "complete")
    assert repos_of(store)["org/new"]["complete"]       # although what the first one left is still there
    assert list(store.rig.hub("spark1", "org/new").glob("blobs/*.incomplete"))


@pytest.mark.parametrize("phase", ["download", "copy"])
def test_a_restart_in_the_middle_of_a_transfer_goes_on_with_it_and_begins_nothing_twice(store, phase):
    slow(store, 0.1)
    store.post("/api/models/newwide/download")
    transfer(store, "running", model="newwide", phase=phase)
    until(lambda: disk_of(store, "spark1" if phase == "download" else "spark2")["repos"][0]["repo"] == "org/newwide")
    store.restart()
    assert store.get("/api/state").json["transfers"][0]["model"] == "newwide"
    transfer(store, "complete", model="newwide")
    copies = (store.rig.spark("spark1") / "rsync.log").read_text().splitlines()
    assert len(downloads(store)) == len(copies) == 1 and repos_of(store, "spark2")["org/newwide"]["complete"]


def test_a_spark_that_goes_away_meanwhile_is_waited_for(store):
    slow(store, 0.15)
    store.post("/api/models/new/download")
    until(lambda: downloads(store))
    store.rig.control("spark1", "down")
    t = transfer(store, "running", seconds=20)
    until(lambda: "spark1" in store.get("/api/state").json["transfers"][0]["waits_for"])
    row = disk_of(store)
    assert "unreachable" in row["error"] and row["remedy"] and "repos" not in row and disk_of(store, "spark2")["repos"]
    store.rig.clear("spark1", "down")
    assert transfer(store, "complete")["id"] == t["id"] and len(downloads(store)) == 1


def test_a_cancel_waits_for_its_spark_and_told_again_it_does_not(store):
    slow(store, 0.3)
    store.post("/api/models/new/download")
    until(lambda: downloads(store))
    store.rig.control("spark1", "down")
    assert store.call("DELETE", "/api/models/new/download").status == 202
    until(lambda: "spark1" in store.get("/api/state").json["transfers"][0]["waits_for"])
    assert store.get("/api/state").json["transfers"][0]["cancelling"]
    assert store.call("DELETE", "/api/models/new/download").status == 202 and not store.get("/api/state").json["transfers"]
    store.rig.clear("spark1", "down")
    assert transfer(store, "cancelled")["note"] == "127.0.0.1 cancelled it" and kinds(store).count("download_cancelled") == 1


def test_a_download_whose_process_is_gone_is_begun_again(store):
    slow(store, 0.2)
    store.post("/api/models/new/download")
    until(lambda: downloads(store))
    pid = downloads(store)[0]["pid"]
    os.killpg(os.getpgid(pid), signal.SIGKILL)      # as a reboot would
    slow(store, 0)
    t = transfer(store, "complete")
    assert t["attempt"] == 0 or "interrupted" in t["note"]
    assert len(downloads(store)) == 2


@pytest.mark.parametrize("fault, code, said", [
    ("gated", "gated_repo", "refuses access"), ("unknown", "repo_not_found", "no such repo"), ("network", "no_network", "spark1 does not reach"),
    ("disk", "disk_full", "disk is full"), ("short", "incomplete", "without model-"), ("uvx", "downloader_missing", "uvx"), ("flood", "gated_repo", "refuses access")])
def test_a_download_that_fails_says_why_in_an_operators_words(store, fault, code, said):
    rig = store.rig
    if fault in ("gated", "flood"):
        rig.publish("org/new", gated=TOKEN + "x")
    if fault == "unknown":
        (rig.root / "hub.json").unlink()
    if fault == "uvx":
        rig.tool("spark1", "uvx", "")
    rig.control("spark1", "hf_fail", fault)
    with (rig.spark("spark1") / "home/spark-vllm-docker/.env").open("a") as f:
        f.write(f'CONTAINER_HF_TOKEN="{TOKEN}"\n')
    store.post("/api/models/new/download")
    error = transfer(store, "failed")["error"]
    assert error["code"] == code and said in error["message"] and error["remedy"] and error["log_tail"], error
    assert "\u202e" not in json.dumps(error, ensure_ascii=False) and len(error["log_tail"]) <= 20
    assert TOKEN not in json.dumps(store.get("/api/disk").json) and kinds(store)[0] == "download_failed"


def test_the_token_reaches_the_program_and_nothing_else(store, tmp_path):
    rig = store.rig
    rig.publish("org/new", gated=TOKEN)
    slow(store, 0.15)
    with (rig.spark("spark1") / "home/spark-vllm-docker/.env").open("a") as f:
        f.write(f"CONTAINER_HF_TOKEN='{TOKEN}'\n")
    store.post("/api/models/new/download")
    until(lambda: downloads(store))
    for pid in rig._processes(f"RIG_ROOT={rig.root}"):
        with contextlib.suppress(OSError):
            assert TOKEN.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    transfer(store, "complete")
    assert downloads(store)[0]["token"] == TOKEN
    shown = store.get("/api/disk").body + store.get("/api/events").body + store.get("/api/state").body
    files = [p.read_bytes() for p in (store.data / "transfers.json", tmp_path / "sparkctl.log", rig.root / "ssh.log")]
    assert TOKEN.encode() not in b"".join([shown, *files])
    own = rig.spark("spark1") / "home/.cache/huggingface/token"     # the Spark's own login comes first
    own.write_text("hf_own")
    rig.publish("org/beta", gated="hf_own")
    shutil.rmtree(rig.hub("spark1", "org/beta"))
    store.post("/api/models/beta/download")
    transfer(store, "complete", model="beta")
    assert downloads(store)[1]["token"] == "hf_own"


def test_without_uvx_hf_downloads_and_a_program_in_the_users_own_bin_is_found(store):
    rig = store.rig
    rig.tool("spark1", "uvx", "")
    own = rig.spark("spark1") / "home/.local/bin"
    own.mkdir(parents=True)
    rig.tool("spark1", "../home/.local/bin/hf")
    store.post("/api/models/new/download")
    transfer(store, "complete")
    assert downloads(store)[0]["program"] == "hf"


def test_a_copy_takes_what_lies_in_the_shared_store_and_survives_a_lost_line(store):
    rig = store.rig
    shutil.rmtree(rig.hub("spark1", "org/wide"))
    shutil.rmtree(rig.hub("spark2", "org/wide"))
    rig.weights("spark1", "org/wide", size=5000, shared=True)
    (rig.hub("spark1", "org/wide") / "blobs/left.0a1b2c3d.incomplete").touch()
    os.rename(rig.hub("spark1", "org/wide") / "blobs/left.0a1b2c3d.incomplete", next(p for p in rig.hub("spark1", "org/wide").glob("blobs/*") if p.is_symlink()).as_posix() + ".0a1b2c3d.incomplete")
    rig.control("spark1", "rsync_fail", "cut")
    assert store.post("/api/models/wide/download").json["steps"] == [["copy", "spark2", str(rig.hub("spark2"))]]
    t = transfer(store, "complete", model="wide")
    assert t["attempt"] == 1 and "interrupted" in t["note"] and not downloads(store)
    row = repos_of(store, "spark2")["org/wide"]
    assert row["complete"] and row["bytes"] == t["bytes"] and row["shared_bytes"] == 0 and not list(rig.hub("spark2", "org/wide").rglob("*.incomplete"))


def test_a_copy_to_this_machine_is_pulled_from_the_spark_that_has_it(rig, start, tmp_path):
    here = rig.spark("spark2")
    env = rig_env(rig, tmp_path, SPARK2_HOST="local", SPARK1_USER="you", HOME=str(here / "home"), RIG_ROOT=str(rig.root), RIG_SPARK="spark2",
                  PATH=f"{here}/bin:{rig.bin}:{os.environ['PATH']}")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    shutil.rmtree(rig.hub("spark2", "org/wide"))
    assert p.post("/api/models/wide/download").status == 202
    transfer(p, "complete", model="wide")
    assert "wide" in repos_of(p, "spark2")["org/wide"]["models"] and repos_of(p, "spark2")["org/wide"]["complete"]
    argv = json.loads((here / "rsync.log").read_text())["argv"]
    assert argv[-2] == f"you@127.0.0.1:{rig.hub('spark1', 'org/wide')}/" and argv[-1] == f"{rig.hub('spark2', 'org/wide')}/"


@pytest.mark.parametrize("fault, code", [("missing", "rsync_missing"), ("hostkey", "copy_refused"), ("denied", "copy_refused")])
def test_a_copy_that_cannot_be_says_what_to_do(store, fault, code):
    shutil.rmtree(store.rig.hub("spark2", "org/wide"))
    store.rig.control("spark1", "rsync_fail", fault)
    store.post("/api/models/wide/download")
    error = transfer(store, "failed", model="wide")["error"]
    assert error["code"] == code and "spark2" in error["message"] + error["remedy"], error


def test_one_transfer_a_spark_and_none_that_does_not_fit(store, tmp_path):
    slow(store, 0.3)
    first = store.post("/api/models/newwide/download").json
    r = store.post("/api/models/new/download", {"hosts": ["spark2"]})
    assert (r.status, r.code) == (409, "transfer_running") and r.json["error"]["transfer"] == first["id"] and "newwide" in r.json["error"]["message"]
    assert store.call("DELETE", "/api/models/newwide/disk").code == "transfer_running"
    store.call("DELETE", "/api/models/newwide/download")
    transfer(store, "cancelled", model="newwide")
    (tmp_path / "models.yaml").write_text((tmp_path / "models.yaml").read_text() + "  vast: {repo: org/vast, size_gb: 99999}\n")
    until(lambda: store.get("/api/models/vast").status == 200)
    r = store.post("/api/models/vast/download")
    assert (r.status, r.code) == (409, "disk_full") and r.json["error"]["needed_gb"] == 99999 and 0 < r.json["error"]["free_gb"] < 99999
    for path, body, status, code in (("nix", {}, 404, "unknown_model"), ("tuned", {}, 409, "local_model"), ("new", {"hosts": ["spark3"]}, 404, "unknown_spark"),
                                     ("new", {"hosts": []}, 422, "bad_field"), ("new", {"hosts": ["spark1", "spark1"]}, 422, "bad_field"), ("new", {"hosts": "x"}, 422, "bad_field")):
        r = store.post(f"/api/models/{path}/download", body)
        assert (r.status, r.code) == (status, code), (path, r.json)
    store.rig.control("spark2", "down")
    assert store.post("/api/models/newwide/download").code == "spark_unreachable"


def test_the_disks_tell_both_layouts_and_count_what_is_shared_once(store):
    rig = store.rig
    alone = repos_of(store)["org/alpha"]
    for repo in ("org/beta", "org/fancy"):
        shutil.rmtree(rig.hub("spark1", repo))
        rig.weights("spark1", repo, size=50_000, shared=True)
    rig.weights("spark1", "org/new", complete=False)
    disk, rows = disk_of(store), repos_of(store)
    both = rows["org/beta"], rows["org/fancy"]
    assert all(row["complete"] and row["bytes"] > 100_000 > 100_000 - row["shared_bytes"] >= -1000 for row in both) and both[0]["models"] == ["beta", "twin"]
    assert disk["used_bytes"] == sum(row["bytes"] for row in rows.values()) - both[0]["shared_bytes"]
    assert alone["bytes"] < 5000 and alone["shared_bytes"] == 0 and disk["total_bytes"] > disk["free_bytes"] > 0
    assert not rows["org/new"]["complete"] and any(m.endswith(".incomplete") for m in rows["org/new"]["missing"])
    assert "model-00002-of-00002.safetensors" in rows["org/new"]["missing"]
    assert rows["tuned"]["local"] and rows["tuned"]["complete"] and rows["tuned"]["models"] == ["tuned"] 
    store_file = next(p for p in rig.hub("spark1").glob("blobs/??/*") if p.suffix != ".refs")
    store_file.unlink()
    assert {r: row["complete"] for r, row in repos_of(store).items()} == {
        "org/alpha": True, "org/beta": False, "org/fancy": False, "org/wide": True, "org/new": False, "tuned": True}


def test_hostile_names_neither_break_nor_forge_a_row(store):
    rig = store.rig
    hub, before = rig.hub("spark1"), repos_of(store)
    names = ["models--evil\nrepo models--org--forged", "models--$(touch pwned)", "models--'\"; rm -rf ~", "models--\u202egpj\x1b[31m", "models--" + "l" * 240,
             "models--x\nfile 1 2 99999999999 81a4 1 1"]
    for name in names:
        (hub / name / "snapshots/r\nmissing x").mkdir(parents=True)
        (hub / name / "blobs").mkdir()
        (hub / name / "blobs/a\nrepo models--org--forged2\n.0a.incomplete").write_bytes(b"x" * 1000)
    index = {"weight_map": {"a": "x" * 10_000 + ".safetensors", "b": "$(id).safetensors", "c": "a\nrepo models--org--forged3\n.safetensors", "d": "../../../../../../etc/passwd"}}
    (hub / "models--org--alpha/snapshots").joinpath(next(iter(os.listdir(hub / "models--org--alpha/snapshots"))), "model.safetensors.index.json").write_text(json.dumps(index))
    os.symlink("/", hub / "models--org--beta/blobs/root")
    rows = repos_of(store)
    odd = {name for name in rows if name not in before}
    assert len(odd) == len(names) and not [n for n in rows if "forged" in n and "?" not in n]
    assert all(row["bytes"] == 1000 and not row["complete"] for name, row in rows.items() if name in odd)
    assert not [p for p in (rig.root).rglob("pwned")] and rows["org/beta"]["bytes"] == before["org/beta"]["bytes"]
    assert not rows["org/alpha"]["complete"] and all(len(m) <= 200 for m in rows["org/alpha"]["missing"]) and rows["org/wide"] == before["org/wide"]
    assert all(not re.search(r"[\x00-\x1f\x7f\u202e]", text) for row in rows.values() for text in (row["name"], *row["missing"]))


def test_what_a_lying_spark_says_of_its_disk_is_passed_over():
    facts, rows = sc.parse_disk("file 1 1 5 81a4 1 1\nmissing x\ndisk a b c\ndisk 9999999999999 1 1\nnonsense\n\nrepo models--a--b\nfile 1 1 10 81a4 5 6\nfile 1 1 10 81a4 5 6\n"
                                "file 1 2 7 41ed 9 9\nfile 1 3 -7 81a4 9 9\nfile 1 4 7 81a4 99999999999 9\npromised 9e9\npromised x\nfile 1 5 ٣ 81a4 1 1\n")
    assert facts == {"hub": "", "total_bytes": 0, "free_bytes": 0}
    assert [(r["name"], r["bytes"], r["used"], r["modified"], r["promised"]) for r in rows] == [("models--a--b", 10, 5, 6, 0)]
    assert sc.shown_disk(facts, rows, {"models--a--b": ["k"]}, {"k"})["repos"][0]["serving"]


def test_weights_are_deleted_by_safe_means_only(store, tmp_path):
    rig, gone = store.rig, lambda spark, repo: not rig.hub(spark, repo).exists()
    delete = lambda key, query="": store.call("DELETE", f"/api/models/{key}/disk{query}")
    r = delete("fancy", "?host=spark2")
    assert r.status == 200 and r.json["hosts"][0]["host"] == "spark2" and r.json["hosts"][0]["freed_bytes"] > 2000
    assert gone("spark2", "org/fancy") and not gone("spark1", "org/fancy") and not list(rig.hub("spark2").glob(".trash*"))
    event = next(e for e in store.get("/api/events").json["events"] if e["kind"] != "lock_released")
    assert event["kind"] == "weights_deleted" and event["client"] and "spark2" in event["text"]
    assert [h["freed_bytes"] > 0 for h in delete("fancy").json["hosts"]] == [True, False] and gone("spark1", "org/fancy")
    assert delete("tuned").code == "local_model" and rig.local.exists() and delete("nix").code == "unknown_model" and delete("alpha", "?host=spark9").code == "unknown_spark"
    assert delete("beta").code == "repo_shared" and delete("beta").json["error"]["models"] == ["twin"]
    token = store.post("/api/swap/lock", {"holder": "cron"}).json["token"]
    assert delete("alpha").code == "swap_locked"
    assert store.call("DELETE", "/api/models/alpha/disk?host=spark2", headers={"X-Swap-Lock-Token": token}).status == 200
    store.call("DELETE", "/api/swap/lock", headers={"X-Swap-Lock-Token": token})
    # a directory that is really elsewhere, and files of the shared store without the program that knows who needs them
    shutil.move(rig.hub("spark2", "org/wide"), tmp_path / "elsewhere")
    rig.hub("spark2", "org/wide").symlink_to(tmp_path / "elsewhere")
    r = delete("wide", "?host=spark2")
    assert (r.status, r.code) == (502, "delete_failed") and "by hand" in r.json["error"]["message"] and (tmp_path / "elsewhere/blobs").exists()
    for repo in ("org/new", "org/beta"):
        shutil.rmtree(rig.hub("spark1", repo), ignore_errors=True)
        rig.weights("spark1", repo, shared=True)
    r = delete("new", "?host=spark1")
    assert r.code == "delete_failed" and "shared" in r.json["error"]["message"] and repos_of(store)["org/new"]["complete"]
    rig.tool("spark1", "hf")
    assert delete("new", "?host=spark1").status == 200 and gone("spark1", "org/new") and repos_of(store)["org/beta"]["complete"]
    freed = delete("beta", "?host=spark1&force=true").json["hosts"][0]["freed_bytes"]
    assert freed > 2000 and not [p for p in rig.hub("spark1").glob("blobs/??/*")]
    rig.control("spark2", "down")
    r = delete("alpha")
    assert r.code == "delete_failed" and [bool(h.get("error")) for h in r.json["error"]["hosts"]] == [False, True] and gone("spark1", "org/alpha")


def test_weights_that_are_served_or_about_to_be_are_not_deleted(store):
    delete = lambda key, query="": store.call("DELETE", f"/api/models/{key}/disk{query}")
    assert store.swap("beta").status == 200
    for key in ("beta", "twin"):                        # the same repo under another name
        r = delete(key, "?force=true")
        assert (r.status, r.code) == (409, "model_serving") and "main" in r.json["error"]["message"]
    assert repos_of(store)["org/beta"]["serving"] and not repos_of(store)["org/alpha"]["serving"]
    store.rig.behave("spark1", "org/alpha", load=3)
    store.post("/api/swap", {"model": "alpha"})
    assert [delete(key, "?force=true").code for key in ("alpha", "beta")] == ["model_serving"] * 2 and delete("fancy").code == "swap_running"
    store.idle()
    assert delete("beta", "?force=true").status == 200 and delete("alpha", "?force=true").code == "model_serving"
    assert all(repos_of(store, s)["org/alpha"]["complete"] for s in store.rig.sparks)


def test_a_swap_and_a_deletion_of_its_weights_do_not_both_begin(store):
    rig = store.rig
    for spark in rig.sparks:                # a deletion that lasts for as long as the file is there
        rig.tool(spark, "hf", '#!/bin/sh\ncase "$*" in *--help*) exit 0;; esac\nwhile [ -e "@ROOT@/hold" ]; do sleep 0.05; done; exit 1\n')
    (rig.root / "hold").touch()
    gone = background(lambda: store.call("DELETE", "/api/models/alpha/disk?host=spark1"))
    until(lambda: [c for c in rig.calls("spark1") if "hf cache rm" in c["command"]])
    got = store.swap("alpha")
    assert got.status == 502 and "org/alpha is being deleted" in errors_of(got.json)[1] and not launches(rig)
    (rig.root / "hold").unlink()
    assert gone.result(60).status == 200
    rig.behave("spark1", "fancy", load=5)
    store.post("/api/swap", {"model": "fancy"})
    assert store.call("DELETE", "/api/models/fancy/disk").code == "model_serving"


def test_weights_that_a_vllm_service_serves_are_not_deleted(rig, start, tmp_path):
    env, port = rig_env(rig, tmp_path), rig.free_port("spark2")
    (tmp_path / "services.yaml").write_text(f"services: {{second: {{kind: vllm, host: spark2, port: {port}}}}}")
    rig.start_foreign("spark2", port, "org/beta")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    until(lambda: p.get("/v1/models").json["data"])
    assert p.call("DELETE", "/api/models/beta/disk").code == "model_serving"


# === 12 monitor ===============================================================

CID = "c" * 64
GB10 = f"""/proc/meminfo:MemTotal:       127600000 kB
/proc/meminfo:MemFree:         20000000 kB
/proc/meminfo:MemAvailable:    60000000 kB
/proc/meminfo:Buffers:          1000000 kB
/proc/meminfo:Cached:          45000000 kB
/proc/meminfo:SwapFree:        16000000 kB
/proc/meminfo:Shmem:            4000000 kB
/proc/meminfo:SReclaimable:     1000000 kB
/proc/pressure/memory:some avg10=1.53 avg60=0.10 avg300=0.00 total=1
/proc/loadavg:0.71 0.46 2.33 1/90 27028
/proc/uptime:22625.98 22313.69
/sys/class/thermal/thermal_zone0/temp:41200
/sys/class/thermal/thermal_zone1/temp:52100
/sys/class/net/enp1s0f1np1/operstate:up
/sys/class/net/docker0/operstate:up
/sys/class/net/enp1s0f1np1/speed:200000
/sys/class/infiniband/rocep1s0f1/ports/1/state:4: ACTIVE
@gpu
96, 91.20, 71, 2411, 580.126.09
@apps
4242, 40960
7, [N/A]
@groups
/proc/4242/cgroup:0::/system.slice/docker-{CID}.scope
system.slice/docker-{CID}.scope/memory.stat:anon 2147483648
system.slice/docker-{CID}.scope/memory.stat:shmem 1073741824
@docker
{CID} vllm_node Up 5 minutes (healthy)
{"d" * 64} asr Exited (137) 5 seconds ago
@df
Filesystem     1024-blocks     Used Available Capacity Mounted on
/dev/nvme0n1p2  3844551680 25144072 2812468400      24% /
@end
"""


def test_a_look_at_a_gb10_is_read_whole_and_its_memory_adds_up():
    facts = sc.parse_spark(GB10)
    view = sc.spark_view(facts, {"vllm_node": ("engines", "main")}, None, False)
    assert view.state == "ok" and view.memory == {"total_gb": 121.7, "available_gb": 57.2, "swap_free_gb": 15.3, "pressure": 1.53}
    assert view.gpu == {"busy": 96, "power_w": 91, "temperature_c": 71, "clock_mhz": 2411, "driver": "580.126.09"}
    assert (view.temperature_c, view.load, view.disk, view.fabric) == (52, 0.71, {"total_gb": 3666, "free_gb": 2682.2}, 1)
    assert view.links == [{"name": "enp1s0f1np1", "state": "up", "mbit": 200000.0}]
    assert view.containers == {"vllm_node": "Up 5 minutes (healthy)", "asr": "Exited (137) 5 seconds ago"}
    told = view.ledger
    assert told["engines"] == {"main": 43.0} and told["others"] == {"processes on the GPU": None} and facts["apps"] == {4242: 40.0, 7: None}
    assert (told["page_cache_gb"], told["unknown_gb"]) == (41.01, 18.61)
    assert abs(told["free_gb"] + told["page_cache_gb"] + told["unknown_gb"] + 43 - told["total_gb"]) < 0.03
    # when the GPU does not tell what processes hold, an engine's part is not known, and not its container's memory alone
    assert sc.ledger({**facts, "apps": None}, {"vllm_node": ("engines", "main")})["engines"] == {"main": None}


@pytest.mark.parametrize("change,field,value", [
    (("96, 91.20, 71, 2411", "[N/A], [Not Supported], , 2411"), "gpu", {"busy": None, "power_w": None, "temperature_c": None, "clock_mhz": 2411, "driver": "580.126.09"}),
    (("96, 91.20, 71, 2411, 580.126.09", "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."), "gpu", None),
    (("@df", "permission denied\n@! docker 1\n@df"), "detail", "answers; docker fails"),
    (("Up 5 minutes (healthy)", "Up 5 minutes (healthy)\nWARNING: Error loading config file"), "containers", {"vllm_node": "Up 5 minutes (healthy)", "asr": "Exited (137) 5 seconds ago"}),
    (("96, 91.20, 71, 2411, 580.126.09", "@! nvidia-smi 124"), "detail", "answers; nvidia-smi hangs"),
    (("96, 91.20, 71, 2411, 580.126.09", "@! nvidia-smi 127"), "detail", "answers; nvidia-smi is not there"),
    (("@df\n", "@df\ndf: /var/lib/docker: Permission denied\n@! df 1\n"), "disk", {"total_gb": 3666, "free_gb": 2682.2}),
    (("/proc/meminfo:MemTotal:", "/proc/meminfo:Memtotal:"), "ledger", None),
    (("@apps\n4242, 40960\n7, [N/A]\n", ""), "state", "ok"),
    ((GB10[GB10.index("@groups"):], ""), "detail", "answers; apps hangs on the Spark"),
    ((GB10, "\u202e\0@\n@@\n:::\n/x/cgroup:docker-\n" * 99), "memory", None),
])
def test_what_a_spark_does_not_tell_is_missing_and_never_made_up(change, field, value):
    assert getattr(sc.spark_view(sc.parse_spark(GB10.replace(*change)), {}, None, False), field) == value


def test_a_spark_that_answers_anything_at_all_breaks_nothing():
    for seed in range(300):
        chance, text = random.Random(seed), list(GB10)
        for _ in range(chance.randrange(1, 80)):
            text[chance.randrange(len(text))] = chance.choice("\n@:/ ,0.a9-\u202e\0|")
        sc.spark_view(sc.parse_spark("".join(text)), {"vllm_node": ("engines", "main")}, None, False).noticed()
    flood = "@docker\n" + "".join(f"{n:064x} c{n} Up\n" for n in range(100_000))
    assert len(sc.parse_spark(flood)["containers"]) < 4000 and sc.parse_spark("\n" * sc.OUTPUT_MAX)["hangs"] == "files"


def spark_state(program):
    return {s["name"]: s for s in program.get("/api/state").json["sparks"]}


def test_a_spark_that_dies_and_comes_back_is_told_and_costs_only_its_own_tile(two):
    state = lambda: spark_state(two)
    until(lambda: {s["state"] for s in state().values()} == {"ok"})
    assert state()["spark1"]["memory"] == {"total_gb": 121.7, "available_gb": 114.4, "swap_free_gb": None, "pressure": None}
    two.rig.control("spark2", "down")
    dead = until(lambda: (s := state()["spark2"])["state"] == "unreachable" and s, 40)
    assert "unreachable" in dead["detail"] and dead["remedy"] and state()["spark1"]["state"] == "ok" and dead["memory"] is None
    two.rig.clear("spark2", "down")
    until(lambda: state()["spark2"]["state"] == "ok", 40)


def test_what_an_engine_holds_on_the_gpu_is_in_its_sparks_ledger_and_a_gpu_that_hangs_is_told(two, looked_at):
    assert two.swap("alpha").status == 200
    told = until(lambda: (led := spark_state(two)["spark1"]["ledger"]) and led["engines"].get("main") and led)
    assert told["engines"] == {"main": 18.69} and spark_state(two)["spark1"]["gpu"]["power_w"] == 3
    two.rig.control("spark1", "nvidia_hangs")
    hung = until(lambda: (s := spark_state(two)["spark1"])["gpu"] is None and s, 40)
    assert hung["state"] == "ok" and "nvidia-smi hangs" in hung["detail"] and hung["memory"] and two.post("/v1/completions", {"prompt": "hi"}).status == 200


class Stub(threading.Thread):
    """A service on spark2: answers says {path: status, JSON or bytes}, which a test may change; got is what it was asked."""

    def __init__(self, answers, host="127.0.0.2"):
        super().__init__(daemon=True)
        self.answers, self.got = answers, []
        stub = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                stub.got.append((self.command, self.path, body, self.headers))
                status, said = stub.answers.get(self.path, (404, {"detail": "Not Found"}))
                if status in ("hangs", "hangs up"):
                    return time.sleep(said)
                if status == "slow":
                    time.sleep(said)
                    status, said = 200, b""
                data = said if isinstance(said, bytes) else json.dumps(said).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            do_POST = do_GET

            def log_message(self, *_):
                pass
        self.server = ThreadingHTTPServer((host, 0), Answer)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.start()

    def run(self):
        self.server.serve_forever(0.05)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


OK = (200, {"status": "ok"})
STUBS = {      # kind -> what it answers, the facts of its tile, what it is asked in a deep check
    "asr": ({"/health": OK, "/v1/models": (200, {"data": [{"id": "parakeet-tdt"}]}), "/v1/audio/transcriptions": (200, {"text": ""})},
            {"model": "parakeet-tdt"}, "/v1/audio/transcriptions"),
    "tts": ({"/health": OK, "/v1/audio/voices": (200, {"voices": [{"id": "af_heart", "name": "Heart"}, "af_sky"]}), "/v1/audio/speech": (200, b"RIFF")},
            {"voices": ["af_heart", "af_sky"]}, "/v1/audio/speech"),
    "embeddings": ({"/health": (200, b""), "/info": (200, {"model_id": "BAAI/bge-m3", "max_input_length": 8192}), "/v1/embeddings": (200, {"data": [{"embedding": [0.1]}]})},
                   {"model": "BAAI/bge-m3"}, "/v1/embeddings"),
    "qdrant": ({"/readyz": (200, b"all shards are ready"), "/collections": (200, {"result": {"collections": [{"name": "notes"}]}, "status": "ok"})},
               {"collections": ["notes"]}, "/collections"),
    "nim": ({"/v1/health/ready": (200, {"object": "health.response", "status": "ready"}), "/v1/models": (200, {"data": [{"id": "meta/llama"}]}),
             "/v1/chat/completions": (200, {"choices": [{"message": {"content": "Hi"}}]})}, {"model": "meta/llama"}, "/v1/chat/completions"),
    "open-webui": ({"/health": (200, {"status": True}), "/api/version": (200, {"version": "0.6.1"})}, {"version": "0.6.1"}, "/health"),
    "http": ({"/": (200, b"hello")}, {}, "/"),
}


@pytest.fixture
def zoo(rig, looked_at, start, tmp_path):
    """A program with a service of every kind on spark2, and a vLLM there that is not ours."""
    stubs = {kind: Stub(dict(answers)) for kind, (answers, _, _) in STUBS.items()}
    port = rig.free_port("spark2")
    rig.start_foreign("spark2", port, "org/side")
    rows = {kind: {"kind": kind, "host": "spark2", "port": stub.port} for kind, stub in stubs.items()}
    rows["side"] = {"kind": "vllm", "host": "spark2", "port": port}
    rows["hidden"] = {"kind": "http", "host": "spark2", "port": stubs["http"].port, "health": "/hidden"}
    rows["gone"] = {"kind": "asr", "host": "spark2", "port": rig.free_port("spark2"), "container": "asr"}
    env = rig_env(rig, tmp_path, DISABLED_SERVICES="hidden", QDRANT_API_KEY="q-secret")
    (tmp_path / "services.yaml").write_text(yaml.safe_dump({"services": rows}))
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    p.rig, p.stubs = rig, stubs
    yield p
    for stub in stubs.values():
        stub.close()


def tiles(program):
    return {s["name"]: s for s in program.get("/api/state").json["services"]}


def test_a_tile_shows_what_its_kind_can_say_and_a_state_is_never_a_guess(zoo):
    zoo.rig.sh("spark2", "docker run -d --name asr busybox sleep infinity")
    until(lambda: all(t["state"] == "serving" for n, t in tiles(zoo).items() if n != "gone") and tiles(zoo)["side"]["facts"].get("running") == 0)
    for kind, (_, facts, _) in STUBS.items():
        assert tiles(zoo)[kind]["facts"] == facts, kind
    side = until(lambda: "tokens_per_s" in (t := tiles(zoo)["side"])["facts"] and t)
    assert side["facts"] == {"model": "org/side", "names": ["org/side"], "running": 0, "waiting": 0, "kv_use": 0.0, "tokens_per_s": 0.0, "prompt_tokens_per_s": 0.0}
    until(lambda: "; docker says of asr: Up" in tiles(zoo)["gone"]["detail"])
    assert tiles(zoo)["gone"]["state"] == "down" and "connection refused" in tiles(zoo)["gone"]["detail"]
    assert "hidden" not in tiles(zoo) and all(path != "/hidden" for _, path, _, _ in zoo.stubs["http"].got)
    assert zoo.stubs["qdrant"].got[-1][3]["Authorization"] == "Bearer q-secret" and zoo.stubs["nim"].got[-1][3]["Authorization"] is None
    for kind, path, answer, state, detail in (
            ("nim", "/v1/health/ready", (503, {"status": "not ready"}), "loading", "/v1/health/ready says 503"),
            ("qdrant", "/collections", (401, b"no"), "serving", "/collections says 401: set QDRANT_API_KEY"),
            ("tts", "/v1/audio/voices", (200, {"voices": "many"}), "serving", ""),
            ("http", "/", (404, b""), "unknown", "/ says 404"), ("open-webui", "/health", (503, b""), "unknown", "/health says 503"),
            ("http", "/", (204, b""), "serving", ""), ("asr", "/health", ("hangs", 30), "unreachable", "no answer in time")):
        zoo.stubs[kind].answers[path] = answer
        until(lambda: (tiles(zoo)[kind]["state"], tiles(zoo)[kind]["detail"]) == (state, detail), what=kind)
    zoo.stubs["embeddings"].close()
    until(lambda: tiles(zoo)["embeddings"]["state"] == "down")
    assert tiles(zoo)["tts"]["facts"] == {} and tiles(zoo)["nim"]["state"] == "loading"     # a hung one delays only itself
    assert "service_unreachable" in kinds(zoo) and "service_down" in kinds(zoo)


def test_what_is_gone_from_the_file_or_is_no_vllm_any_more_tells_no_figures(zoo):
    until(lambda: tiles(zoo)["side"]["facts"].get("running") == 0)
    path = Path(zoo.dir / "services.yaml")
    rows = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({"services": {**rows["services"], "side": {**rows["services"]["side"], "kind": "http", "health": "/health"}}}))
    until(lambda: tiles(zoo)["side"]["kind"] == "http" and tiles(zoo)["side"]["facts"] == {})
    path.write_text(yaml.safe_dump(rows))
    until(lambda: tiles(zoo)["side"]["facts"].get("running") == 0)
    del rows["services"]["side"]
    path.write_text(yaml.safe_dump(rows))
    until(lambda: "side" not in tiles(zoo))
    looks = lambda: len(zoo.get("/api/history").json["services"].get("side", {"at": []})["at"])
    until(lambda: looks() == (time.sleep(2.5) or looks()), what="the end of its history")


def test_a_deep_check_has_every_service_do_its_work_and_says_which_cannot(zoo):
    until(lambda: all(t["state"] == "serving" for n, t in tiles(zoo).items() if n != "gone"))
    got = zoo.get("/api/health/deep").json
    rows = {row["name"]: row for row in got["services"]}
    assert {name for name, row in rows.items() if not row["ok"]} == {"gone"} and not got["ok"] and "hidden" not in rows
    for kind, (_, _, asked) in STUBS.items():
        assert asked in [path for _, path, _, _ in zoo.stubs[kind].got[-3:]] and rows[kind]["seconds"] < 5, kind
    form = next(body for _, path, body, _ in zoo.stubs["asr"].got if "transcriptions" in path)
    assert b'name="model"\r\n\r\nparakeet-tdt\r\n' in form and b"RIFF" in form and form.endswith(b"\r\n--sparkctl--\r\n")
    zoo.stubs["asr"].answers["/v1/audio/transcriptions"] = (200, {"error": "no GPU"})
    zoo.stubs["tts"].answers["/v1/audio/speech"] = (200, b"")
    zoo.stubs["nim"].answers["/v1/chat/completions"] = (500, {"detail": "x"})
    rows = {row["name"]: row for row in zoo.get("/api/health/deep").json["services"]}
    assert [rows[k]["detail"] for k in ("asr", "tts", "nim")] == ["/v1/audio/transcriptions says 200 and not what it should",
                                                                  "/v1/audio/speech says 200 and not what it should", "/v1/chat/completions says 500"]


def test_a_deep_check_is_not_green_because_an_engine_is_silent(two):
    deep = lambda: two.get("/api/health/deep").json
    assert deep()["ok"] and [(row["name"], row["detail"]) for row in deep()["services"]] == [("main", "nothing is served, and nothing should be")]
    assert two.swap("alpha").status == 200 and deep()["ok"] and deep()["services"][0]["detail"].startswith("alpha answered")
    two.rig.sh("spark1", "docker rm -f vllm_node")
    got = until(lambda: not (d := deep())["ok"] and d)
    assert got["services"][0]["detail"] == "alpha: connection refused"
    rows = {row["name"]: row for row in two.get("/api/connectivity").json["places"]}
    assert not rows["main"]["ok"] and rows["main"]["detail"] == "connection refused"
    assert two.post("/api/unload?wait=60").status == 200 and deep()["ok"] and two.get("/api/connectivity").json["ok"]


def test_real_work_is_judged_by_what_it_brings_and_not_by_its_status_alone():
    bad, good = (501, b"no chat"), (200, {"data": [{"embedding": [1]}]})
    for answers, told in (({"/v1/chat/completions": (200, b"hello")}, "/v1/chat/completions says 200 and not what it should"),
                          ({"/v1/chat/completions": (200, b"3")}, "/v1/chat/completions says 200 and not what it should"),
                          ({"/v1/chat/completions": (400, b"{}"), "/v1/embeddings": (404, b"")}, "/v1/chat/completions says 400"),
                          ({"/v1/chat/completions": (500, b"{}"), "/v1/embeddings": good}, "/v1/chat/completions says 500"),
                          ({"/v1/chat/completions": bad, "/v1/embeddings": good}, None)):
        stub = Stub(answers, "127.0.0.1")
        try:
            assert sc.ask_for_work("vllm", sc.Endpoint("127.0.0.1", stub.port), "", {"model": "m"}, 5) == "/v1/embeddings answered" and told is None
        except sc.Refused as e:
            assert str(e) == told
        finally:
            stub.close()


WORK_DONE = {"/v1/completions": (200, {"choices": [{"text": "."}]}), "/v1/embeddings": (200, {"data": [{"embedding": [0.5]}]}),
             "/pooling": (200, {"data": [{"data": [0.5]}]}), "/v1/audio/transcriptions": (200, {"text": ""})}


@pytest.mark.parametrize("answers, told", [*(({path: said}, None) for path, said in WORK_DONE.items()),
    ({"/v1/completions": (200, {"choices": []})}, "/v1/completions: HTTP 200 without a result"),
    ({"/v1/completions": (200, b"<html>")}, "/v1/completions: HTTP 200 without a result"),
    ({"/v1/completions": (500, b"{}"), "/pooling": WORK_DONE["/pooling"]}, "/v1/completions: HTTP 500"), ({}, "/v1/completions: HTTP 404"), (None, "connection refused")])
def test_an_engine_is_ready_when_it_does_the_work_of_its_model_whatever_that_is(answers, told):
    stub, ends = Stub({path: (404, b"{}") for path in WORK_DONE} | (answers or {}), "127.0.0.1"), []
    if answers is None:
        stub.close()
    run = types.SimpleNamespace(config=types.SimpleNamespace(settings={"SWAP_WARM_TIMEOUT": 5.0}), slot=None, _watch=lambda s, pause: time.sleep(pause),
                                endpoint=lambda slot: sc.Endpoint("127.0.0.1", stub.port), log=types.SimpleNamespace(add=lambda line: None),
                                m=types.SimpleNamespace(_observe=lambda *seen: None, _conclude=lambda phase, plans: ends.append(phase)))
    try:
        sc.SwapRun.do_warming(run, types.SimpleNamespace(model="m", slot="main", plan=types.SimpleNamespace(served_names=("m",))))
        assert ends == ["ready"] and told is None
    except sc.Failed as e:
        assert told and str(e).endswith(f"({told})") and not ends
    finally:
        stub.close()


def test_applications_are_given_addresses_that_work_from_another_machine(start, tmp_path):
    rows = {"asr": {"kind": "asr", "host": "spark1", "port": 5092}, "far": {"kind": "vllm", "host": "spark2", "port": 8000}, "off": {"kind": "http", "host": "spark2", "port": 7},
            "open-webui": {"host": "spark2", "url": "https://chat.example.org/"}, "six": {"kind": "http", "host": "spark3", "port": 80}}
    (tmp_path / "services.yaml").write_text(yaml.safe_dump({"services": rows}))
    p = start({"SPARK1_HOST": "local", "SPARK2_HOST": "203.0.113.9", "SPARK3_HOST": "2001:db8::7", "DISABLED_SERVICES": "off,qdrant", "POLL_SECONDS": "1"},
              args=("--services", str(tmp_path / "services.yaml")))
    got = p.get("/api/endpoints", headers={"Host": f"spark-a.local:{p.port}"}).json
    assert got["base_url"] == f"http://spark-a.local:{p.port}/v1" and got["slots"][0]["name"] == "main" and got["needs_key"] is False
    rows = {row["name"]: row for row in got["services"]}
    assert {n: row["base_url"] for n, row in rows.items()} == {
        "asr": "http://spark-a.local:5092", "far": "http://203.0.113.9:8000", "off": "http://203.0.113.9:7", "open-webui": "https://chat.example.org/",
        "qdrant": "http://[2001:db8::7]:6333", "six": "http://[2001:db8::7]:80"}
    assert {n for n, row in rows.items() if row["disabled"]} == {"off", "qdrant"} == {n for n, row in rows.items() if row["state"] == "disabled"}
    assert rows["asr"]["openai_base_url"] == "http://spark-a.local:5092/v1" and rows["six"]["openai_base_url"] is None
    assert {s["name"] for s in p.get("/api/services").json["services"]} == {"asr", "far", "open-webui", "six"}


def test_connectivity_tells_every_host_and_port_apart(zoo):
    zoo.rig.control("spark1", "denied")
    got = zoo.get("/api/connectivity").json
    rows = {(row["name"], row["kind"]): row for row in got["places"]}
    assert not rows["spark1", "ssh"]["ok"] and "Permission denied" in rows["spark1", "ssh"]["detail"] and "ssh-copy-id" in rows["spark1", "ssh"]["remedy"]
    assert rows["spark2", "ssh"]["ok"] and rows["side", "vllm"]["ok"] and rows["gone", "asr"]["detail"] == "connection refused"
    assert not any(name == "hidden" for name, _ in rows) and rows["asr", "asr"]["port"] == zoo.stubs["asr"].port and not got["ok"]


def test_a_services_log_is_told_followed_and_its_reader_may_leave(zoo):
    zoo.rig.sh("spark2", "docker run -d --name asr busybox sh -c 'echo one; printf \"two \\033[31mred\\n\"; sleep 1; echo three; exec sleep 60'")
    got = until(lambda: (r := zoo.get("/api/services/gone/logs?tail=2")).status == 200 and b"two" in r.body and r)
    assert "two red" in (lines := got.body.decode().splitlines()) and len(lines) == 2 and got.headers["Content-Type"].startswith("text/plain")
    with socket.create_connection(("127.0.0.1", zoo.port), 10) as s:
        s.sendall(b"GET /api/services/gone/logs?follow=true&tail=10 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        said = b""
        while b"three" not in said:
            said += (chunk := s.recv(4096))
            assert chunk
        reading = [c for c in zoo.rig.calls("spark2") if "docker logs" in c["command"] and " -f " in c["command"]]
        assert len(reading) == 1 and os.path.exists(f"/proc/{reading[0]['pid']}")

        def followers():
            with contextlib.suppress(OSError):  # one ended while it was looked at
                return [pid for pid in zoo.rig._processes("RIG_SPARK=spark2") if b"\0logs\0" in Path(f"/proc/{pid}/cmdline").read_bytes()]
            return followers()
        assert followers()
    until(lambda: not os.path.exists(f"/proc/{reading[0]['pid']}"), what="the end of what nobody reads")
    until(lambda: not followers(), what="the end of it on the Spark")
    for name, status, code in (("hidden", 404, "unknown_service"), ("nothing", 404, "unknown_service"), ("asr", 409, "no_container")):
        got = zoo.get(f"/api/services/{name}/logs")
        assert (got.status, got.code) == (status, code), name
    zoo.rig.sh("spark2", "docker rm -f asr; docker run -d --name asr busybox sleep 60")
    with socket.create_connection(("127.0.0.1", zoo.port), 10) as s:        # one that says nothing is answered all the same
        s.sendall(b"GET /api/services/gone/logs?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert s.recv(4096).startswith(b"HTTP/1.1 200")
    zoo.rig.sh("spark2", "docker rm -f asr")
    got = zoo.get("/api/services/gone/logs")
    assert (got.status, got.code) == (502, "logs_failed") and "No such" in got.json["error"]["message"]
    assert zoo.get("/api/services/gone/logs?follow=true").code == "logs_failed"
    assert "broke off" not in zoo.said()        # who leaves is no error


def test_a_built_in_service_has_a_tile_once_it_was_seen_and_a_strangers_port_is_not_taken_for_it(tmp_path, monkeypatch):
    stub, other = Stub(dict(STUBS["tts"][0]), "127.0.0.1"), Stub(STUBS["embeddings"][0] | STUBS["http"][0], "127.0.0.1")
    monkeypatch.setattr(sc, "BUILTINS", (("kokoro", "tts", stub.port), ("qdrant", "qdrant", stub.port), ("embeddings", "embeddings", other.port)))
    (tmp_path / "m.yaml").write_text("models: {}")
    (tmp_path / "s.yaml").write_text(f"services: {{mine: {{kind: http, host: spark1, port: {other.port}}}}}")
    store = sc.ConfigStore(sc.parse_settings({"SPARK1_HOST": "local", "POLL_SECONDS": "1"}),
                           {"models": str(tmp_path / "m.yaml"), "services": str(tmp_path / "s.yaml"), "overrides": "/nowhere"})
    app = sc.App(store, str(tmp_path))
    states = lambda: {t["name"]: t["state"] for t in app.state()["services"]}
    try:
        app.start()
        until(lambda: states() == {"kokoro": "serving", "mine": "serving"} and len(other.got) > 2)
        assert {path for _, path, _, _ in other.got} == {"/"}
        stub.close()
        until(lambda: states()["kokoro"] == "down")
    finally:
        app.close()
        other.close()


def test_counters_that_begin_again_are_no_negative_rate_and_a_frozen_engine_is_counted():
    told = sc.parse_vllm_metrics('vllm:num_requests_running{engine="0",model_name="a } 9"} 2.0\nvllm:num_requests_running{engine="1"} 1\n'
                                 'vllm:generation_tokens_total{x="y"} 1e+03\nvllm:kv_cache_usage_perc NaN\nvllm:prompt_tokens_total 7 \nrubbish 1\n')
    assert told == {"running": 3.0, "generation_tokens": 1000.0}
    assert sc.parse_vllm_metrics('vllm:num_requests_running{engine="0"} 2\nvllm:num_requests_running{engine="1"} NaN\nvllm:kv_cache_usage_perc 55\n') == {}
    assert sc.parse_vllm_metrics('vllm:kv_cache_usage_perc{engine="0"} 0.2\nvllm:kv_cache_usage_perc{engine="1"} 1.0\n') == {"kv_use": 1.0}
    first = sc.vitals_after(None, told, 10.0)
    assert first.facts == {"running": 3.0} and first.frozen == 0
    second = sc.vitals_after(first, {**told, "generation_tokens": 1100.0}, 20.0)
    assert second.facts["tokens_per_s"] == 10.0 and second.frozen == 0
    assert "tokens_per_s" not in sc.vitals_after(second, {**told, "generation_tokens": 50.0}, 30.0).facts     # it began anew, nobody knows when
    assert sc.vitals_after(second, second.told, 30.0).frozen == 1 and sc.vitals_after(second, {**second.told, "running": 0}, 30.0).frozen == 0


def test_an_engine_that_holds_requests_and_makes_no_token_is_wedged_until_it_makes_one(rig, looked_at, start, tmp_path, monkeypatch):
    stub = Stub({"/health": (200, b""), "/v1/models": (200, {"data": [{"id": "alpha"}]}), "/v1/completions": (500, {"error": {}})}, "127.0.0.1")
    counted = lambda running, tokens: stub.answers.update({"/metrics": (200, (
        f"vllm:num_requests_running {running}\nvllm:prompt_tokens_total 5\nvllm:generation_tokens_total {tokens}\n").encode())})
    counted(0, 100)
    rig.control("spark1", "nvidia.json", json.dumps({"power.draw": "88.1"}))
    p = start(rig_env(rig, tmp_path, VLLM_PORT=str(stub.port)), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    until(lambda: serves(p)["state"] == "serving" and (spark_state(p)["spark1"]["gpu"] or {}).get("power_w") == 88)
    posts = lambda: [r for r in stub.got if r[0] == "POST"]
    asked = lambda: len([r for r in stub.got if r[1] == "/metrics"])
    counted(2, 100)
    before = asked()
    until(lambda: asked() > before + 5)
    assert serves(p)["state"] == "serving" and not posts()          # it draws power: it works, on a long prompt, say
    for spark in ("spark1", "spark2"):
        rig.control(spark, "nvidia.json", json.dumps({"power.draw": "[N/A]"}))
    until(lambda: all(v["gpu"] and v["gpu"]["power_w"] is None for v in spark_state(p).values()))
    before = asked()
    until(lambda: asked() > before + 5)
    assert serves(p)["state"] == "serving" and not posts()          # what it draws is not known, so nothing is
    rig.control("spark1", "nvidia.json", "{}")
    rig.control("spark2", "nvidia.json", "{}")
    until(lambda: serves(p)["state"] == "wedged")
    assert len(posts()) == 1
    stub.answers["/metrics"], before = (500, b""), len(stub.got)      # an engine that tells nothing at all is no better
    until(lambda: len(stub.got) > before + 12)
    assert serves(p)["state"] == "wedged" and "engine_recovered" not in kinds(p)
    counted(2, 100)
    before = asked()
    until(lambda: asked() > before + 2)
    assert posts() and "engine_wedged" in kinds(p) and p.running() is None and serves(p)["served_id"] == "alpha"
    counted(2, 101)
    until(lambda: serves(p)["state"] == "serving")
    assert kinds(p)[:2].count("engine_recovered") == 1
    stub.answers["/v1/completions"] = OK                             # idle and slow, and alive
    before = asked()
    tried = len(posts())
    until(lambda: len(posts()) > tried and asked() > before + 5)
    assert serves(p)["state"] == "serving"
    stub.close()


def test_an_engine_that_is_slow_to_answer_is_not_lost_and_a_silent_port_is_not_called_empty(rig, start, tmp_path):
    stub = Stub({"/health": (200, b""), "/v1/models": (200, {"data": [{"id": "alpha"}]}), "/v1/completions": (200, {"choices": []})}, "127.0.0.1")
    p = start(rig_env(rig, tmp_path, VLLM_PORT=str(stub.port)), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    until(lambda: serves(p)["state"] == "serving")
    stub.answers["/health"], before = ("slow", 3), len(stub.got)        # two seconds are not enough, and eight are
    until(lambda: len(stub.got) > before + 4)
    assert serves(p)["state"] == "serving" and "model_lost" not in kinds(p) and p.post("/v1/completions", {"prompt": "x"}).status == 200
    stub.answers["/health"] = ("hangs up", 0)
    until(lambda: serves(p)["state"] == "unknown")
    assert serves(p)["detail"] == "hangs up"
    stub.close()
    until(lambda: serves(p)["state"] == "empty")
    assert any("alpha and now nothing (" in e["text"] for e in p.get("/api/events").json["events"] if e["kind"] == "model_lost")


def within_a_minute(job):
    """What job() returned, which must not take what hostile input could make it take: hours."""
    done = concurrent.futures.Future()
    threading.Thread(target=lambda: done.set_result(job()), daemon=True).start()
    return done.result(60)


@pytest.mark.parametrize("line", ["/thermal_zone" * 80000 + ":5", "/net/" * 200000 + ":1", "docker-" + "a" * 64 + "docker/" * 100000 + ":1"],
                         ids=["heat", "net", "docker"])
def test_a_line_without_end_costs_the_reader_of_a_spark_no_more_than_its_length(line):
    assert within_a_minute(lambda: sc.parse_spark(f"{line}\n@groups\n{line}\n@end\n"))["temperature_c"] is None


def test_what_ssh_says_without_end_is_read_in_time():
    hosts = sc.Hosts([sc.Spark("spark1", "spark1", "")])
    hosts.run_once = lambda *_: sc.Result("unreachable", 255, "", "mux_client_" * 20000)
    assert within_a_minute(lambda: hosts.run("spark1", "true", 5)).code == 255
    hosts.close()
    got = sc.run_process(["sh", "-c", "yes noise | head -c 3000000 >&2; echo last >&2; exit 255"], 60)
    assert got.code == 255 and got.err.endswith("last\n") and len(got.err) <= 65536


def test_an_alias_that_ssh_cannot_resolve_is_asked_for_again_only_by_who_may_wait():
    hosts, asked, known = sc.Hosts([sc.Spark("spark1", "spark1", "")]), [], {}
    hosts._resolve = lambda spark: asked.append(spark) or known
    assert [hosts.address("spark1") for _ in range(3)] == ["spark1"] * 3 and len(asked) == 1
    known["hostname"] = "10.0.0.7"
    assert hosts.address("spark1") == "spark1" and hosts.address("spark1", again=True) == "10.0.0.7" == hosts.address("spark1") and len(asked) == 2
    hosts.close()


def test_what_a_spark_tells_that_cannot_be_is_not_told():
    got = sc.parse_spark("/proc/meminfo:MemTotal: 1000 kB\n/proc/meminfo:MemAvailable: 999999 kB\n/proc/meminfo:MemFree: 10 kB\n"
                         "@gpu\n999999, 24.0, 999, 2405, 580\n@end\n")
    assert "MemAvailable" not in got["memory"] and (got["gpu"]["busy"], got["gpu"]["power_w"], got["gpu"]["temperature_c"]) == (None, 24.0, None)
    empty = sc.parse_spark("")
    assert empty["containers"] is None and sc.spark_view(empty, {}, sc.SparkView("ok", memory={"total_gb": 1}), False).state == "unknown"


@pytest.mark.parametrize("kind, well, ill", [
    ("vllm", {"choices": [{"message": {"content": "."}}]}, [{"choices": []}, {"choices": None}, "no choices here", ["choices"], {"error": {}}]),
    ("embeddings", {"data": [{"embedding": [0.1, 0.2]}]}, [{"data": []}, {"data": [{"embedding": []}]}, {"data": [{"embedding": [float("nan")]}]}]),
    ("asr", {"text": ""}, [{"text": None}, {"error": "text"}]),
    ("qdrant", {"result": {"collections": []}}, [{"result": None, "status": {"error": "x"}}]),
    ("tts", b"RIFF....WAVE", [{"error": "no voice"}, b"<html>login", b""])])
def test_only_work_counts_as_work(kind, well, ill):
    path = {"vllm": "/v1/chat/completions", "embeddings": "/v1/embeddings", "asr": "/v1/audio/transcriptions", "qdrant": "/collections", "tts": "/v1/audio/speech"}[kind]
    stub = Stub({path: (200, well)}, "127.0.0.1")
    ask = lambda: sc.ask_for_work(kind, sc.Endpoint("127.0.0.1", stub.port), "", {}, 5)
    assert ask() == f"{path} answered"
    for said in ill:
        stub.answers[path] = (200, said)
        with pytest.raises(sc.Refused):
            ask()
    stub.close()


def test_an_engine_whose_models_have_no_name_serves_none():
    stub = Stub({"/health": (200, b""), "/v1/models": (200, {"data": [{"id": ""}, {"id": None}, {"id": {"x": 1}}]})}, "127.0.0.1")
    assert sc.probe_vllm_endpoint(sc.Endpoint("127.0.0.1", stub.port)) == sc.Probe("foreign", (), "it serves no model")
    stub.close()


def test_the_thread_of_what_left_the_file_ends():
    store = types.SimpleNamespace(current=types.SimpleNamespace(settings={"DISABLED_SERVICES": ()}, layout=types.SimpleNamespace(slots={}, services={})))
    m = sc.Monitor(store, None, sc.Hub(), None)
    m.manager, m._watched = types.SimpleNamespace(mark=lambda name: (None, ())), {"slot-a", "service-b"}
    for name, look in (("a", m._look_at_slot), ("b", m._look_at_service)):
        thread = sc.forever(name, threading.Event(), functools.partial(look, name))
        thread.start()
        thread.join(10)
        assert not thread.is_alive()
    assert not m._watched


def test_a_disabled_service_is_sent_no_request_from_the_moment_it_is():
    config = types.SimpleNamespace(settings={"DISABLED_SERVICES": ()}, layout=types.SimpleNamespace(slots={"main": 1}, services={"v": 2}))
    assert (sc.place_of(config, "service:v"), sc.place_of(config, "main")) == (2, 1)
    config.settings["DISABLED_SERVICES"] = ("v",)
    assert (sc.place_of(config, "service:v"), sc.place_of(config, "main")) == (None, 1)


@pytest.mark.parametrize("said", [("out", "line"), ("err", "")], ids=["line", "beat"])
def test_a_client_that_reads_nothing_is_written_to_no_more(said):
    tried = []

    def send(data):
        tried.append(data)
        raise BlockingIOError

    def run(spark, script, timeout_s, cancel, take):
        for _ in range(5):
            take(*said)
        return sc.Result("ok", 0, "", "")
    sc.App.on_spark(types.SimpleNamespace(hosts=types.SimpleNamespace(run=run)), "spark1", "x", "", "true", 5, None, send)
    assert len(tried) == 1


def test_what_hangs_ends_with_us_and_the_lock_of_a_restart_too(tmp_path):
    got = queue.Queue()
    threading.Thread(target=lambda: got.put(sc.run_process(["sleep", "600"], 500)), daemon=True).start()
    until(lambda: [p for p in sc.CHILDREN.copy() if p.args == ["sleep", "600"]])
    sc.end_children()
    assert got.get(timeout=20).code == -signal.SIGKILL and not [p for p in sc.CHILDREN.copy() if p.args == ["sleep", "600"]]
    m = manager(tmp_path)
    with contextlib.suppress(ZeroDivisionError), m.holding("", False, "restart of asr", "127.0.0.1"):
        assert m.book.lease.holder == "restart of asr"
        m.close()
        assert m.book.lease is None
        1 / 0


def test_rings_are_bounded_and_a_minute_is_the_mean_of_what_is_known():
    h = sc.History()
    for second in range(0, 30 * 3600, 5):
        h.add(1_800_000_000 + second, {("sparks", "spark1"): (100.0, None if second % 10 else 50.0, 3.0, None), ("slots", "main"): (1, 0, 0.5, 10.0)}, {"sparks": ["spark1"], "slots": ["main"]})
    now = 1_800_000_000 + 30 * 3600
    fine, coarse = h.read(now, 60), h.read(now, 1440)
    assert [len(ring) for ring in h._rings["sparks", "spark1"]] == [720, 1440, 12] and len(fine["sparks"]["spark1"]["at"]) == 720 and fine["sparks"]["spark1"]["gpu_busy"][-2:] == (50.0, None)
    told = coarse["sparks"]["spark1"]
    assert 1400 < len(told["at"]) <= 1440 and set(told["gpu_busy"]) == {50.0} and set(told["temperature_c"]) == {None} and told["hours"][-1]["gpu_busy"] == 50.0
    assert coarse["slots"]["main"]["tokens_per_s"][0] == 10.0 and len(h.read(now, 5)["sparks"]["spark1"]["at"]) == 60
    h.add(now + 5, {}, {"sparks": ["spark1", "spark2"], "slots": []})          # who is silent is remembered, who is gone is not
    assert list(h.read(now, 60)["sparks"]) == ["spark1"] and not h.read(now, 1440)["slots"]


def test_the_history_fills_at_the_pace_of_the_looks(two, looked_at):
    got = until(lambda: (h := two.get("/api/history?minutes=5").json)["sparks"].get("spark1", {}).get("power_w", [None])[-1] and h)
    assert got["sparks"]["spark1"]["available_gb"][-1] == 114.4 and len(got["sparks"]["spark1"]["at"]) == len(got["sparks"]["spark1"]["gpu_busy"])
    assert two.get("/api/history?minutes=0").status == 422


def told_names(text):
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}


def test_metrics_are_what_an_independent_parser_takes_and_the_readme_names_them(two, looked_at):
    began = time.monotonic()
    assert two.swap("alpha").status == 200 and two.get("/nothing").status == 404 and two.call("MAKEUP", "/api/state").status == 405
    waited = time.monotonic() - began           # of which nothing is in the histogram: it was told to wait
    two.post("/api/swap", {"model": "nothing"})
    until(lambda: (spark_state(two)["spark1"]["ledger"] or {}).get("engines") and serves(two)["facts"].get("running") is not None)
    got = two.get("/metrics")
    text = got.body.decode()
    assert got.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8" and text.endswith("\n")
    table = README[README.index("| metric |"):]
    assert {f'sparkctl_events_total{{kind="{kind}"}}' for kind in sc.EVENTS} <= {line.rpartition(" ")[0] for line in text.splitlines()}
    assert {e["kind"] for e in two.get("/api/events").json["events"]} <= set(sc.EVENTS)
    assert told_names(text) == set(re.findall(r"`(sparkctl_\w+)", table[:table.index("\n\n")]))
    with contextlib.suppress(ImportError):
        from prometheus_client.parser import text_string_to_metric_families
        values = {(s.name, *sorted(s.labels.items())): s.value for family in text_string_to_metric_families(text) for s in family.samples}
        assert values["sparkctl_slot_up", ("model", "alpha"), ("slot", "main")] == 1 and values["sparkctl_swaps_total", ("outcome", "ready")] == 1
        assert values["sparkctl_spark_memory_bytes", ("name", "main"), ("part", "engines"), ("spark", "spark1")] > 18 << 30
        assert values["sparkctl_http_requests_total", ("method", "POST"), ("status", "404")] == 1 and values["sparkctl_swap_phase_seconds_count", ("phase", "loading")] == 1
        assert values["sparkctl_http_request_seconds_bucket", ("le", "+Inf"), ("method", "GET")] == values["sparkctl_http_request_seconds_count", ("method", "GET")] > 2
        assert values["sparkctl_http_requests_total", ("method", "other"), ("status", "405")] == 1     # clients make up no names of series
        assert ("sparkctl_http_request_seconds_count", ("method", "POST")) not in values or values["sparkctl_http_request_seconds_sum", ("method", "POST")] < waited
        return
    need(False, "prometheus_client")


def test_what_is_named_in_a_metric_may_be_hostile():
    said = sc.prometheus([("sparkctl_x", "gauge", "help", [("", {"a": 'b"\\\n\u202e\ud800'}, 1), ("", {}, None), ("_y", {}, float("inf"))])]).decode()
    assert said == '# HELP sparkctl_x help\n# TYPE sparkctl_x gauge\nsparkctl_x{a="b\\"\\\\\\n\u202e?"} 1.0\nsparkctl_x_y +Inf\n'


def watched_swap(two):
    """(a swap that loads for long, the looks at spark1 that a swap asks for)"""
    two.rig.behave("spark1", "alpha", load=60)
    until(lambda: spark_state(two)["spark1"]["state"] == "ok")
    swap = two.post("/api/swap", {"model": "alpha"}).json
    two.phase("loading")
    return swap, lambda: [c for c in two.rig.calls("spark1") if "@gpu" in c["command"] and "@docker" not in c["command"]]


def test_of_a_spark_that_freezes_during_a_swap_the_last_seconds_are_kept_with_the_swap(two, looked_at):
    swap, light = watched_swap(two)
    until(lambda: len(light()) > 1)
    two.rig.control("spark1", "meminfo", MEMINFO.replace("120000000", "  1048576"))
    before = len(light())
    until(lambda: len(light()) > before + 1)
    two.rig.control("spark1", "down")
    until(lambda: spark_state(two)["spark1"]["state"] == "unreachable")
    two.rig.control("spark1", "meminfo", MEMINFO)
    two.rig.clear("spark1", "down")
    until(lambda: spark_state(two)["spark1"]["memory"] == {"total_gb": 121.7, "available_gb": 114.4, "swap_free_gb": None, "pressure": None})
    before = len(light())                       # what it tells when it is back does not push out what it told before
    until(lambda: len(light()) > before + 1)
    two.call("DELETE", f"/api/swap/{swap['id']}")
    two.idle()
    box = two.get(f"/api/swap/{swap['id']}").json["blackbox"]
    assert list(box) == ["spark1"] and box["spark1"]["lost_at"] and 1 < len(box["spark1"]["samples"]) <= 60
    assert box["spark1"]["samples"][-1]["available_gb"] == 1.0 and box["spark1"]["samples"][-1]["power_w"] == 3.42
    assert two.restart().get(f"/api/swap/{swap['id']}").json["blackbox"] == box
    two.rig.behave("spark1", "alpha", load=0.3)
    assert two.swap("alpha").status == 200 and two.get("/api/swap").json["recent"][0]["id"] != swap["id"]
    assert two.get(f"/api/swap/{two.get('/api/swap').json['recent'][0]['id']}").json["blackbox"] is None


def test_of_two_freezes_the_later_is_kept_even_if_the_swap_was_over_before_it_was_known(two, looked_at):
    swap, light = watched_swap(two)

    def freeze(kb):
        two.rig.control("spark1", "meminfo", MEMINFO.replace("120000000", kb))
        before = len(light())
        until(lambda: len(light()) > before + 2)
        two.rig.control("spark1", "down")
    freeze("  1048576")
    until(lambda: spark_state(two)["spark1"]["state"] == "unreachable")
    two.rig.clear("spark1", "down")
    until(lambda: spark_state(two)["spark1"]["state"] == "ok")
    freeze("  2097152")
    two.call("DELETE", f"/api/swap/{swap['id']}")
    two.idle()
    kept = lambda: ((two.get(f"/api/swap/{swap['id']}").json["blackbox"] or {}).get("spark1") or {"samples": [{}]})["samples"][-1].get("available_gb")
    until(lambda: kept() == 2.0)
    two.restart()
    assert kept() == 2.0


SPARK_SAID = "".join(f"/proc/meminfo:{line}\n" for line in MEMINFO.splitlines()) + "@gpu\n@end\n"


def watcher(monkeypatch):
    """A Monitor in this process that looks at one Spark when told -> (it, its hosts, what it keeps of swaps, kinds of its events)."""
    config = types.SimpleNamespace(settings={"POLL_SECONDS": 5}, sparks={"spark1": None}, layout=types.SimpleNamespace(slots={"main": types.SimpleNamespace(hosts=("spark1",))}))
    kept, told, hosts = [], [], types.SimpleNamespace(address=lambda name, again: None)
    m = sc.Monitor(types.SimpleNamespace(current=config, sparks=config.sparks), hosts, sc.Hub(), types.SimpleNamespace(add=lambda kind, *said, **facts: told.append(kind)))
    m.manager = types.SimpleNamespace(book=types.SimpleNamespace(running=None), keep_box=lambda *box: kept.append(box))
    monkeypatch.setattr(m, "_rest", lambda *how: None)
    monkeypatch.setattr(sc, "owners_of", lambda config, spark: {})
    monkeypatch.setattr(sc, "remedy_for", lambda got, spark: "")
    return m, hosts, kept, told


def test_every_change_of_a_sparks_state_is_an_event_but_for_the_first_look(monkeypatch):
    m, hosts, _, told = watcher(monkeypatch)
    for kind, out in (("ok", SPARK_SAID), ("ok", "Welcome!\n"), ("unreachable", ""), ("unreachable", ""), ("ok", SPARK_SAID), ("ok", SPARK_SAID)):
        hosts.run = lambda name, script, limit: types.SimpleNamespace(kind=kind, out=out, err="")
        m._look_at_spark("spark1")
    assert told == ["spark_unknown", "spark_unreachable", "spark_ok"] and set(told) <= set(sc.EVENTS)


@pytest.mark.parametrize("rest, seconds", [("", 20), ("@docker\n", 36)])
def test_a_spark_is_stale_when_it_is_late_and_later_where_a_part_of_it_hangs(monkeypatch, rest, seconds):
    m, hosts, _, _ = watcher(monkeypatch)
    hosts.run = lambda name, script, limit: types.SimpleNamespace(kind="ok", out=SPARK_SAID.replace("@end\n", rest or "@end\n"), err="")
    m._look_at_spark("spark1")
    heard = m._sparks["spark1"].heard
    for after, state in ((seconds - 6, "ok"), (seconds, "stale")):
        monkeypatch.setattr(sc.time, "monotonic", lambda: heard + after)
        assert m.spark("spark1").state == state


@pytest.mark.parametrize("at_the_look, after", [("a", None), ("a", "a-rb"), (None, None), ("a-rb", "a-rb"), ("a", "a")])
def test_the_last_looks_are_the_swaps_that_asked_for_them_whatever_runs_when_the_silence_is_known(monkeypatch, at_the_look, after):
    running = lambda id_: id_ and types.SimpleNamespace(id=id_, slot="main", dry_run=False)
    m, hosts, kept, _ = watcher(monkeypatch)
    book = m.manager.book

    def look(kind, then):
        book.running, answer = running(then), types.SimpleNamespace(kind=kind, out=SPARK_SAID if kind == "ok" else "", err="")
        return answer
    for kind, now, then in (("ok", "a", "a"), ("ok", "a", "a"), ("time_out", at_the_look, after), ("time_out", after, after)):
        book.running, hosts.run = running(now), lambda name, script, limit: look(kind, then)
        m._look_at_spark("spark1")
    (swap, spark, told), = kept                 # the second look at what is silent tells nothing new
    assert (swap, spark, len(told["samples"]), told["lost_at"]) == ("a", "spark1", 2, told["samples"][-1]["at"])


def test_a_spark_that_hangs_delays_no_long_poll_no_request_and_no_swap_of_another(rig, start, tmp_path):
    env = rig_env(rig, tmp_path)
    (tmp_path / "services.yaml").write_text(f"slots: {{main: {{hosts: [spark1], port: {rig.port}, container: vllm_node}}}}\n"
                                            "services: {far: {kind: http, host: spark2, port: 9, container: far}}")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    until(lambda: {s["state"] for s in spark_state(p).values()} == {"ok"})
    assert p.swap("alpha").status == 200
    rig.control("spark2", "freeze")
    until(lambda: spark_state(p)["spark2"]["state"] == "stale", 30)
    assert "has not answered since" in spark_state(p)["spark2"]["detail"] and spark_state(p)["spark1"]["state"] == "ok"
    told = re.findall(r'^(sparkctl_spark_\w+)\{spark="spark2".* (\S+)$', p.get("/metrics").body.decode(), re.M)
    assert told == [("sparkctl_spark_up", "0.0")]           # no figure that was true once

    def timed(call, *args, **more):
        began = time.monotonic()
        return call(*args, **more), time.monotonic() - began
    with concurrent.futures.ThreadPoolExecutor(16) as pool:     # ssh needs 10 s to see that it hangs: what waited for it would take longer than 8
        asks = [pool.submit(timed, p.post, "/v1/completions", {"prompt": "hi", "max_tokens": 1}) for _ in range(40)]
        logs = pool.submit(p.get, "/api/services/far/logs")
        poll = pool.submit(timed, p.get, f"/api/state?since={p.get('/api/state').json['version']}&wait=50")
        lock(p)
        assert poll.result(20)[1] < 8
        assert all(got.status == 200 and took < 8 for got, took in (a.result(30) for a in asks))
        got, took = timed(p.call, "POST", "/api/swap?wait=60&force=true", {"model": "beta"})
        assert got.json["phase"] == "ready" and took < 8 and spark_state(p)["spark2"]["state"] != "ok"
        rig.clear("spark2", "freeze")
        logs.result(60)


def test_a_spark_that_hangs_costs_a_swap_which_does_not_need_it_no_downtime(two):
    until(lambda: {s["state"] for s in spark_state(two).values()} == {"ok"})
    assert two.swap("alpha").status == 200
    two.rig.control("spark2", "freeze")
    got = two.swap("beta", wait=120).json
    took = {row["phase"]: row["seconds"] for row in got["phases"]}
    two.rig.clear("spark2", "freeze")
    assert got["phase"] == "ready" and took["checking"] < 14 and sum(took.values()) - took["checking"] < 10, took
    assert next(c for c in got["checks"] if c["name"] == "reachable")["status"] == "warn"


# === 13 data path =============================================================

def test_what_is_served_is_listed_under_all_its_names(two):
    assert two.get("/v1/models").json == {"object": "list", "data": []}
    assert two.swap("alpha").status == 200
    assert [c["id"] for c in two.get("/v1/models").json["data"]] == ["alpha", "org/alpha", "gpt-4o"]


def test_chat_and_completions_reach_the_engine_unchanged_and_without_our_key(rig, start, tmp_path):
    p = start(rig_env(rig, tmp_path, SPARKCTL_API_KEY="ours", VLLM_API_KEY="engines"), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    auth = {"Authorization": "Bearer ours"}
    assert p.post("/api/swap?wait=60", {"model": "alpha"}, headers=auth).status == 200
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "grüße 日本"}], "temperature": 0.1}
    got = p.post("/v1/chat/completions", body, headers=auth)
    assert got.status == 200 and "grüße 日本" in got.json["choices"][0]["message"]["content"]
    until(lambda: rig.requests("spark1")[-1]["body"] == body)
    assert p.post("/v1/chat/completions", body).status == 401
    assert p.post("/v1/chat/completions", body, headers={"Authorization": "Bearer engines"}).status == 401


def test_a_stream_arrives_as_it_is_written_and_ends_where_it_ends(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "alpha", tokens=10, token_delay=0.05)
    body = json.dumps({"model": "alpha", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    with socket.create_connection(("127.0.0.1", two.port), 10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        arrivals, data = [], b""
        while not data.endswith(b"0\r\n\r\n"):
            data += sock.recv(65536)
            arrivals.append(time.monotonic())
        assert data.count(b"data: ") >= 10 and b"data: [DONE]" in data
        assert len(arrivals) >= 8, "the stream was gathered up instead of passed on"
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")        # the connection goes on
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_a_client_that_goes_away_ends_the_engines_work(two):
    assert two.swap("alpha").status == 200
    with held_request(two, seconds=30):
        pass
    until(lambda: [r for r in two.rig.requests("spark1") if r.get("aborted")], 3)


def test_a_client_that_goes_away_before_the_first_byte_ends_the_engines_work_too(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "alpha", warm_delay=60)
    with socket.create_connection(("127.0.0.1", two.port), 5) as sock:
        sock.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}')
        until(lambda: serves(two)["in_flight"] == 1)
    until(lambda: serves(two)["in_flight"] == 0, 3)


def test_an_engine_that_dies_in_mid_stream_is_seen_to_have_died(two):
    assert two.swap("alpha").status == 200
    with held_request(two, seconds=30) as sock:
        two.rig.kill_engine("spark1")
        data = b""
        sock.settimeout(10)
        while chunk := sock.recv(65536):
            data += chunk
        assert not data.endswith(b"0\r\n\r\n")


def test_a_request_without_a_model_to_an_empty_slot_is_told_to_start_one(two):
    got = two.post("/v1/chat/completions", {"messages": []})
    assert (got.status, got.code) == (503, "nothing_served") and got.headers["Retry-After"]


def test_embeddings_reach_the_engine_too(crooked):
    crooked.engine.answer = b'HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n{"data": []}'
    assert crooked.post("/v1/embeddings", {"model": "m", "input": "x"}).json == {"data": []}


@pytest.mark.parametrize("model,status,code", [("nope", 404, "model_not_found"), ("beta", 503, "model_not_serving"), (7, 422, "bad_field")])
def test_a_request_for_what_is_not_served_is_told_so(two, model, status, code):
    got = two.post("/v1/completions", {"model": model, "prompt": "x"})
    assert (got.status, got.code) == (status, code)
    assert (got.headers["Retry-After"] is not None) == (got.headers["x-should-retry"] == "false") == (status == 503)       # no swap runs


def test_an_engine_error_passes_through_and_a_dead_engine_gets_a_neutral_one(two):
    assert two.swap("alpha").status == 200
    got = two.post("/v1/completions", {"model": "alpha", "prompt": "x", "max_tokens": 10**9})
    assert got.status == 400 and "max_model_len" in got.json["error"]["message"]
    two.rig.kill_engine("spark1")
    got = two.post("/v1/completions", {"prompt": "x"})
    assert (got.status, got.code) in ((502, "engine_unreachable"), (502, "engine_failed"), (503, "nothing_served"))
    assert "127.0.0.1" not in got.json["error"]["message"] and "Error" not in got.json["error"]["message"]


@pytest.fixture
def crooked(start, tmp_path):
    """sparkctl before an engine that answers POSTs with whatever bytes are put into .answer."""
    class Engine(threading.Thread):
        def __init__(self):
            super().__init__(daemon=True)
            self.sock, self.answer = socket.create_server(("127.0.0.1", 0)), b""
            self.port = self.sock.getsockname()[1]
            self.start()

        def run(self):
            with contextlib.suppress(OSError):
                while True:
                    c, _ = self.sock.accept()
                    with contextlib.suppress(OSError), c:
                        asked = c.recv(65536)
                        card = b'{"data": [{"id": "m"}]}'
                        c.sendall(self.answer if asked.startswith(b"POST") else b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(card) + card)
    engine = Engine()
    (tmp_path / "m.yaml").write_text("models: {m: {repo: a/m}}")
    p = start({"SPARK1_HOST": "local", "VLLM_PORT": str(engine.port)}, args=("--models", str(tmp_path / "m.yaml"), "--services", str(tmp_path / "none.yaml")))
    p.engine = engine
    until(lambda: serves(p)["state"] == "serving")
    yield p
    engine.sock.close()


@pytest.mark.parametrize("answer,status,body,goes_on", [
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nEVIL", 200, b"ok", True),
    (b"HTTP/1.1 204 No\r\n\r\nEVIL", 204, b"", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nHTTP/1.1 200 EVIL", 200, b"ok", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", 200, b"\r\n0\r\n\r\n", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 200, b"", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nok\r\n0\r\nTrail: er\r\n\r\n", 200, b"ok", True),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok", 200, None, False),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n\r\n", 200, None, False),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 502, None, True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", 200, None, False),
    (b"HTTP/1.0 200 OK\r\n\r\nto the end", 200, b"to the end", False),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok", 502, None, True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok", 502, None, True),
    (b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\r\n\r\nok", 502, None, True),
    (b"HTTP/1.1 200 OK\r\nX: 1\nSet-Cookie: a=b\r\nContent-Length: 2\r\n\r\nok", 502, None, True),
    (b"HTTP/1.1 101 Switching\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", True),
    (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", True),
    pytest.param(b"HTTP/1.1 102 Wait\r\n\r\n" * 9000 + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", 502, None, True, id="102 without end"),
    (b"HTTP/1.1 000 X\r\nContent-Length: 2\r\n\r\nok", 502, None, True),
    (b"nonsense", 502, None, True),
    (b"", 502, None, True),
    (b'HTTP/1.1 429 Slow\r\nRetry-After: 7\r\nContent-Length: 26\r\n\r\n{"error": {"message": "m"}}'.replace(b"26", b"27"), 429, b'{"error": {"message": "m"}}', True),
    (b'HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\n1b\r\n{"error": {"message": "m"}}\r\n0\r\n\r\n', 400, b'{"error": {"message": "m"}}', True),
    (b"HTTP/1.1 500 Oops\r\nContent-Length: 9\r\n\r\nTraceback", 500, None, True),
])
def test_a_crooked_engine_cannot_confuse_the_clients_connection(crooked, answer, status, body, goes_on):
    crooked.engine.answer = answer
    asked = b'{"prompt": "x"}'
    with socket.create_connection(("127.0.0.1", crooked.port), 5) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(asked) + asked)
        reply = http.client.HTTPResponse(sock, method="POST")
        reply.begin()
        assert reply.status == status
        if body is not None:
            assert reply.read() == body
        elif status == 200:
            with pytest.raises(http.client.IncompleteRead):
                reply.read()
        else:
            assert json.loads(reply.read())["error"]["code"] in ("engine_failed", "engine_error")
        if b"Retry-After" in answer:
            assert reply.headers["Retry-After"] == "7"
        assert reply.headers["Set-Cookie"] is None
        if goes_on:
            sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
            assert b"EVIL" not in sock.recv(1000)
        else:
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(100) == b""


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_the_end_of_a_chunked_body_is_found_however_it_is_cut_up(cut):
    rng = random.Random(cut)
    for _ in range(200):
        chunks = [bytes(rng.choice(b"0\r\n;a") for _ in range(rng.randint(1, 30))) for _ in range(rng.randint(0, 5))]
        body = b"".join(b"%x\r\n%s\r\n" % (len(c), c) for c in chunks) + b"0\r\n\r\n"
        end, got, data = sc.BodyEnd(None, True, keep=True), b"", body + b"NEXT"
        for i in range(0, len(data), cut):
            if not end.done:
                got += end.take(data[i:i + cut])
        assert end.done and got == body and end.data == b"".join(chunks)

class Keeper(threading.Thread):
    """An engine that keeps connections open; .handle(sock, head, body, n) answers the n-th request on one, True to go on."""

    def __init__(self, handle):
        super().__init__(daemon=True)
        self.sock, self.handle, self.connections, self.seen = socket.create_server(("127.0.0.1", 0)), handle, 0, []
        self.port = self.sock.getsockname()[1]
        self.start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.one, args=(self.sock.accept()[0],), daemon=True).start()

    def one(self, c):
        data, n = b"", 0
        with contextlib.suppress(OSError), c:
            while True:
                while b"\r\n\r\n" not in data:
                    if not (chunk := c.recv(65536)):
                        return
                    data += chunk
                head, _, data = data.partition(b"\r\n\r\n")
                if head.startswith(b"GET"):                 # a probe
                    card = b'{"data": [{"id": "m"}]}'
                    c.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(card) + card)
                    return
                n += 1
                self.connections += n == 1
                length = re.search(rb"(?i)content-length: (\d+)", head)
                while length and len(data) < min(int(length[1]), 60000):
                    data += c.recv(65536)
                body, data = data, b""
                self.seen.append((head, body))
                if not self.handle(c, head, body, n):
                    return


def plain(c, head, body, n, said=b'{"model": "m", "usage": {"prompt_tokens": 3, "completion_tokens": 4}}'):
    c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
    return True


@pytest.fixture
def kept(start, tmp_path):
    """kept(handle, **settings): sparkctl before a Keeper that serves the model m."""
    engines = []

    def go(handle=plain, **env):
        engines.append(Keeper(handle))
        (tmp_path / "m.yaml").write_text("models: {m: {repo: a/m}}")
        p = start({"SPARK1_HOST": "local", "VLLM_PORT": str(engines[0].port), **env},
                  args=("--models", str(tmp_path / "m.yaml"), "--services", str(tmp_path / "none.yaml")))
        p.engine = engines[0]
        key = {"Authorization": f"Bearer {env.get('SPARKCTL_API_KEY')}"}
        until(lambda: p.get("/v1/models", headers=key).json["data"])
        return p
    yield go
    for engine in engines:
        engine.sock.close()


def test_connections_to_the_engine_are_used_again_and_a_stale_one_costs_nothing(kept):
    closed = threading.Event()

    def answer(c, head, body, n):
        plain(c, head, body, n)
        if n == 6:                                  # after this answer the engine closes without a word
            c.close()
            closed.set()
        return n < 6
    p = kept(answer)
    client = http.client.HTTPConnection("127.0.0.1", p.port, timeout=10)

    def ask():
        client.request("POST", "/v1/completions", b"{}")
        return len(client.getresponse().read())
    assert [ask() for _ in range(6)] == [69] * 6 and p.engine.connections == 1
    assert closed.wait(10) and [ask() for _ in range(2)] == [69] * 2
    assert p.engine.connections == 2 and len(p.engine.seen) == 8
    client.close()


def test_a_request_that_may_have_been_processed_is_never_sent_twice(kept):
    p = kept(lambda c, head, body, n: n == 1 and plain(c, head, body, n))
    client = http.client.HTTPConnection("127.0.0.1", p.port, timeout=10)

    def ask():
        client.request("POST", "/v1/completions", b"{}")
        got = client.getresponse()
        return got.read() and got.status
    assert [ask(), ask()] == [200, 502] and (len(p.engine.seen), p.engine.connections) == (2, 1)
    client.close()


def test_the_engine_gets_the_body_unchanged_its_own_key_and_its_own_path(kept):
    p = kept(VLLM_API_KEY="theirs", SPARKCTL_API_KEY="ours")
    body = b'{"prompt":  "\\u00fc", "stream" :false}'
    got = p.call("POST", "/v1/tokenize?x=1&y", body, {"Authorization": "Bearer ours", "Cookie": "a=b", "X-Mine": "kept", "Connection": "X-Hop", "X-Hop": "1"})
    head, sent = p.engine.seen[-1]
    assert got.status == 200 and sent == body and head.startswith(b"POST /tokenize?x=1&y HTTP/1.1\r\n")
    assert b"Bearer theirs" in head and b"X-Mine: kept" in head and not any(word in head for word in (b"ours", b"Cookie", b"X-Hop", b"Connection"))


@pytest.mark.parametrize("path", ["/sleep", "/wake_up", "/metrics", "/collective_rpc", "/v1/load_lora_adapter", "/v1/../sleep", "/v1/completions/../../sleep", "/%2e/sleep", "//sleep", "/v1/completions%2f..%2fsleep"])
def test_what_only_the_engine_offers_is_not_forwarded(kept, path):
    p = kept()
    assert p.post(path, {}).status in (404, 405) and not p.engine.seen


@pytest.mark.parametrize("sent", [b"9\r\ndata: 1\n\n\r\n", b"9\r\ndata: 1\n\n", b"9\r\ndata: 1\n\n\r", b"b\r\ndata: 1\r\n\r\n\r\n", b"b\r\ndata: 1\r\n\r\n", b""])
@pytest.mark.parametrize("apart", [False, True])
def test_the_end_of_a_connections_reply_ends_an_sse_stream_with_an_error_first(kept, sent, apart):
    def handle(c, head, body, n):
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n" + sent[:-1])
        time.sleep(0.1 * apart)
        c.sendall(sent[-1:])
    p = kept(handle)
    got = raw(p.port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", end=False)
    body = got.partition(b"\r\n\r\n")[2]
    size, _, event = body[len(sent.rstrip(b"\r\n")) and body.index(b"\r\n", body.index(b"data: 1") + 11 - (b"\r\n\r\n" not in sent) * 2) + 2:].partition(b"\r\n")
    assert event.startswith(b'event: error\ndata: {"error": {') and event.endswith(b"\n\n\r\n") and len(event) == int(size, 16) + 2 and body.startswith(sent)
    row = p.get("/api/activity").json["requests"][0]
    assert (row["status"], row["model"], row["served_by"]) == (200, None, "main")


def test_a_reader_that_does_not_read_costs_bounded_memory(kept):
    sent = []

    def handle(c, head, body, n):
        c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 300000000\r\n\r\n")
        for _ in range(300):
            c.sendall(bytes(1000000))
            sent.append(1)
    p = kept(handle)
    memory = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{p.process.pid}/status").read_text())[1]) / 1024
    before = memory()
    with socket.create_connection(("127.0.0.1", p.port)) as sock:
        sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}")
        until(lambda: sent)
        until(lambda: len(sent) == (time.sleep(0.5), len(sent))[1])          # it stands still
        assert len(sent) < 50 and memory() < before + 20
    until(lambda: serves(p)["in_flight"] == 0)


FORM = b'--XX\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--XX\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_is_passed_on_as_it_comes_with_flat_memory(kept, chunked):
    got = []

    def handle(c, head, body, n):
        got.append(len(body))
        while sum(got) < 60_000_000:
            got.append(len(c.recv(1 << 20)))
        return plain(c, head, body, n)
    p = kept(handle)
    until(lambda: p.get("/healthz").status == 200)
    memory = lambda: int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{p.process.pid}/status").read_text())[1]) / 1024
    before = memory()
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 60000000"
    with socket.create_connection(("127.0.0.1", p.port), 10) as sock:
        def send(data):
            sock.sendall(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
        sock.sendall(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=XX\r\nExpect: 100-continue\r\n%b\r\n\r\n" % framing)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        send(FORM)
        send(bytes(70000))
        until(lambda: sum(got) > 60000)             # it is there before we send the rest
        for _ in range(59):
            send(bytes(1_000_000))
        send(bytes(60_000_000 - 59_000_000 - 70000 - len(FORM)))
        sock.sendall(b"0\r\n\r\n" if chunked else b"")
        assert sock.recv(100).startswith(b"HTTP/1.1 200 OK")
    assert memory() < before + 12
    assert (b"Transfer-Encoding: chunked" if chunked else b"Content-Length: 60000000") in p.engine.seen[-1][0]


@pytest.mark.parametrize("framing", [b"Content-Length: 3000000", b"Transfer-Encoding: chunked"])
def test_an_upload_that_is_too_large_is_413_before_it_is_read(kept, framing):
    p = kept(lambda c, head, body, n: [c.recv(1 << 20) for _ in range(1000)], MAX_UPLOAD_MB="1")
    with socket.create_connection(("127.0.0.1", p.port), 10) as sock:
        sock.sendall(b"POST /v1/audio/translations HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % framing)
        data = b"2dc6c0\r\n" + bytes(2_000_000)     # goes on sending, as curl does
        with contextlib.suppress(OSError):
            sock.sendall(data)
        assert b" 413 " in sock.recv(100)
    assert p.get("/healthz").status == 200


def test_an_engine_may_answer_before_an_upload_is_over(kept):
    def handle(c, head, body, n):
        said = b'{"error": {"message": "no audio here"}}'
        c.sendall(b"HTTP/1.1 415 No\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
        time.sleep(1)
    p = kept(handle)
    head = b"POST /v1/audio/translations HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=XX\r\nContent-Length: 9000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", p.port), 10) as sock:
        sock.sendall(head + FORM + bytes(70000))
        got = b""
        while chunk := sock.recv(65536):
            got += chunk
        assert got.startswith(b"HTTP/1.1 415 ") and b"no audio here" in got and b"\r\nConnection: close\r\n" in got


@pytest.mark.parametrize("data,boundary,model", [
    (FORM, "XX", "m"), (FORM, '"XX"', "m"), (FORM[:60], "XX", None), (FORM, "YY", None), (b"", "XX", None), (FORM.replace(b'"model"', b"model"), "XX", "m"),
    (FORM.replace(b'name="model"', b'name="file"; filename="model"'), "XX", None), (FORM.replace(b"\r\nm\r\n", b"\r\n\xff\r\n"), "XX", "\ufffd"),
])
def test_the_model_of_a_form_is_found_in_its_first_parts(data, boundary, model):
    assert sc.model_of_form(data, f"multipart/form-data; boundary={boundary}") == model
    assert sc.model_of_form(data, "multipart/form-data") is None


@pytest.mark.parametrize("body,model", [
    ('{"model": "a", "messages": [{"model": "b"}], "x": {"model": "c"}, "pad": PAD}', "a"), ('{"pad": PAD, "model": "a", "model": "b"}', "b"), ('{"pad": PAD}', None),
    ('{"pad": PAD, "model": null}', None), ('{"pad": PAD, "a\\"}": ["model", {"model": "b"}], "\\u006dodel" :  "a\\n"}', "a\n"), ('{"model": "a", "pad": "model", "x": PAD}', "a"),
    ('{"pad": [PAD, "😀"], "model": "ü😀\\u00fc"}', "ü😀ü"), ('{"pad": PAD, "model": 7}', int), ('{"pad": PAD, "model": {"model": "a"}}', dict), ("[PAD]", ValueError), ("PAD", ValueError), ('{"model": PAD', ValueError),
    pytest.param("[" * 100_000 + "PAD", (ValueError, RecursionError), id="deep")])
def test_the_model_of_a_body_is_the_same_whether_it_is_small_or_large(body, model):
    for size in (1, 80_000):
        data = body.replace("PAD", f'"{"x" * size}"').encode()
        if model in (int, dict):
            assert not isinstance(sc.model_of_json(data), str | None)
        elif model in (ValueError, (ValueError, RecursionError)):
            with pytest.raises(model):
                sc.model_of_json(data)
        else:
            assert sc.model_of_json(data) == model


def test_of_a_large_body_only_its_model_is_kept(tmp_path):
    body = b'{"model": "m", "messages": [' + b",".join([b'{"role": "user", "content": [{"type": "text", "text": "hi"}, [], []]}'] * 20_000) + b"]}"
    tracemalloc.start()
    try:
        assert sc.model_of_json(body) == "m"
        assert tracemalloc.get_traced_memory()[1] < 4 * len(body)
    finally:
        tracemalloc.stop()


def test_a_header_with_bare_line_ends_is_refused_at_once(bare):
    for data in (b"GET /healthz HTTP/1.1\nHost: localhost\n\n", b"GET /healthz HTTP/1.1\r\nHost: localhost\n\r\n"):
        assert raw(bare.port, data, end=False).startswith(b"HTTP/1.1 400 ")


def test_a_connection_with_something_unread_or_closed_is_not_used_again():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for act, quiet in ((lambda s: None, True), (lambda s: s.sendall(b"x"), False), (lambda s: s.close(), False)):
            with socket.create_connection(server.getsockname()[:2]) as ours, server.accept()[0] as theirs:
                act(theirs)
                assert sc.is_quiet(ours) if quiet else until(lambda: not sc.is_quiet(ours))


@pytest.mark.parametrize("framing,begun", [(b"Content-Length: 9000", FORM), (b"Transfer-Encoding: chunked", b"%x\r\n%b\r\n" % (len(FORM), FORM))], ids=["length", "chunks"])
def test_what_follows_of_a_refused_body_is_no_request(kept, framing, begun):
    p = kept()
    asked = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    head = b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=XX\r\n" + framing + b"\r\n\r\n"
    got = raw(p.port, head + begun.replace(b"\r\nm\r\n", b"\r\nz\r\n") + b"\r\n" * 100 + asked, end=False)
    assert re.match(rb"HTTP/1.1 40[04] ", got) and got.count(b"HTTP/1.1") == 1 and b"\r\nConnection: close\r\n" in got


def test_of_two_connection_fields_both_count(kept):
    got = raw(kept().port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: keep-alive\r\nConnection: close\r\n\r\n", end=False)
    assert got.startswith(b"HTTP/1.1 200 ") and b"\r\nConnection: close\r\n" in got


def test_an_engine_that_says_continue_gets_the_rest_of_an_upload(kept):
    told, got = threading.Event(), []

    def handle(c, head, body, n):
        c.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.2)                                 # it stands there while sparkctl waits for the client
        told.set()
        got.append(len(body))
        while sum(got) < len(FORM) + 200_000 and (chunk := c.recv(65536)):
            got.append(len(chunk))
        plain(c, head, body, n)
    p = kept(handle)
    with socket.create_connection(("127.0.0.1", p.port), 10) as s:
        s.sendall(b"POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=XX\r\n"
                  b"Content-Length: %d\r\n\r\n" % (len(FORM) + 200_000) + FORM + bytes(70_000))
        assert told.wait(10)
        s.sendall(bytes(130_000))
        assert s.recv(4096).startswith(b"HTTP/1.1 200 ") and sum(got) == len(FORM) + 200_000


def test_all_bodies_together_have_a_limit(kept):
    p = kept(MAX_BODY_MB="1")
    with contextlib.ExitStack() as stack:
        def send(n, size):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", p.port), 10))
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n" + bytes(size))
            return sock
        idle = [send(n, 1) for n in range(9)]               # who only announces much keeps nobody out
        assert p.post("/v1/completions", b'{"prompt": "' + b"x" * 900000 + b'"}').status == 200 and not select.select(idle, [], [], 0)[0]
    with contextlib.ExitStack() as stack:
        socks = [send(n, 999999) for n in range(9)]
        refused = until(lambda: [s for s in socks if select.select([s], [], [], 0)[0]])
        said = refused[0].recv(4096)
        assert len(refused) < 3 and b"too_much_at_once" in said and b"\r\nConnection: close\r\n" in said
    assert until(lambda: p.post("/v1/completions", b'{"prompt": "' + b"x" * 900000 + b'"}').status == 200)
    # chunks count for what they hold, and the last byte may be one too many
    for size, status in ((1 << 20, 200), ((1 << 20) + 1, 413)):
        body = b'{"prompt": "' + b"x" * (size - 14) + b'"}'
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(body[i:i + 5000]), body[i:i + 5000]) for i in range(0, size, 5000))
        got = raw(p.port, b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n", end=False)
        assert got.startswith(b"HTTP/1.1 %d " % status), got[:300]


def variants(rng):
    """Requests that are right, and such with one to three bytes or lines spoiled."""
    body = rng.choice([b"{}", b'{"prompt": "x"}'])
    framing = [b"Content-Length: %d" % len(body)] if rng.random() < 0.5 else [b"Transfer-Encoding: chunked"]
    if framing[0].startswith(b"T"):
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    lines = [b"POST /v1/completions HTTP/1.1", b"Host: localhost", *framing, b"X-A: b"]
    for _ in range(rng.randint(0, 3)):
        kind, at = rng.randrange(7), rng.randrange(1, len(lines))
        if kind == 0:
            lines.insert(at, rng.choice([b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Transfer-Encoding : chunked", b"Content-Length: +2", b"Content-Length: 2, 2",
                                         b" folded", b"Transfer-Encoding: xchunked", b"Host: other", b"A\0: b", b"Content-Length:\x0b2", b": x"]))
        elif kind == 1:
            lines[at] += rng.choice([b"\r", b"\n", b"\0", b" ", b"\x0b", b"\nTransfer-Encoding: chunked"])
        elif kind == 2:
            lines[0] = rng.choice([b"POST  /v1/completions HTTP/1.1", b"POST /v1/completions HTTP/1.1 ", b"POST /v1/completions HTTP/9.9", b"POST /v1/completions", b"post /v1/completions HTTP/1.1",
                                   b"POST /v1/completions\tHTTP/1.1", b"POST http://localhost/v1/completions HTTP/1.1"])
        elif kind == 3:
            i = rng.randrange(len(body))
            body = body[:i] + bytes([rng.randrange(256)]) + body[i + 1:]
        elif kind == 4:
            body = body.replace(b"\r\n", rng.choice([b"\n", b"\r", b"\r\r\n", b" \r\n", b";a=b\r\n"]), 1)
        elif kind == 5:
            i = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:i] + bytes([rng.randrange(256)]) + lines[at][i + 1:]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_what_a_strict_parser_rejects_never_reaches_the_engine(kept):
    h11 = pytest.importorskip("h11") if not CI else __import__("h11")
    p, rng, reached, rejected = kept(), random.Random(5), 0, 0
    for n in range(600):
        data = variants(rng)
        theirs, before = h11.Connection(h11.SERVER), len(p.engine.seen)
        theirs.receive_data(data)
        theirs.receive_data(b"")
        try:
            events = [theirs.next_event()]
            while not isinstance(events[-1], (h11.EndOfMessage, h11.ConnectionClosed)) and events[-1] is not h11.NEED_DATA:
                events.append(theirs.next_event())
            good = isinstance(events[-1], h11.EndOfMessage)
        except h11.RemoteProtocolError:
            good = False
        got = raw(p.port, data, seconds=3)
        passed = len(p.engine.seen) - before
        assert passed <= good, (data, got)
        assert passed == got.count(b"HTTP/1.1 200 "), (data, got)
        reached, rejected = reached + passed, rejected + (not good)
    assert reached > 50 and rejected > 200


def test_what_was_asked_is_listed_and_counted_with_its_tokens(kept):
    p = kept()
    rows = lambda: p.get("/api/activity").json["requests"]
    p.post("/v1/completions", {"model": "m", "prompt": "x"})
    until(rows)                         # a row comes after its reply, so that of the next request could overtake it
    p.post("/v1/completions", {"model": "nope\u202e", "prompt": "x"})
    newest, first = until(lambda: len(got := rows()) == 2 and got)
    assert (first["model"], first["status"], first["prompt_tokens"], first["completion_tokens"], first["served_by"]) == ("m", 200, 3, 4, "main")
    assert 0 < first["first_byte_seconds"] <= first["seconds"] < 5 and first["client"] == "127.0.0.1" and first["tokens_per_second"] > 0
    assert (newest["model"], newest["status"], newest["served_by"], newest["first_byte_seconds"]) == ("nope\ufffd", 404, None, None)


def test_counters_and_histograms_are_what_prometheus_wants():
    activity = sc.Activity()
    for seconds in (0.005, 0.02, 1000):
        activity.add((1e9, "c", "POST /v1/completions", 200, 7, seconds, "id", "m", "main", "m", seconds / 2, True, b'{"usage": {"prompt_tokens": 3, "completion_tokens": 4}}'))
    activity.add((1e9, "c", "POST /v1/completions", 404, 7, 0.1, "id", "made up", None, "", 0.0, False, b""))
    activity.add((1e9, "c", "GET /healthz", 200, 7, 0.1, "id"))
    got = {name: (kind, samples) for name, kind, _, samples in activity.families()}
    assert all(name.startswith("sparkctl_") for name in got) and len(activity.recent()) == 4
    assert [(s[1]["model"], s[1]["status"], s[2]) for s in got["sparkctl_requests_total"][1]] == [("", "404", 1), ("m", "200", 3)]
    assert [s[2] for s in got["sparkctl_completion_tokens_total"][1]] == [0, 12]
    kind, samples = got["sparkctl_request_seconds"]
    buckets = [(s[1]["le"], s[2]) for s in samples if s[0] == "_bucket" and s[1]["model"] == "m"]
    assert kind == "histogram" and buckets[:2] == [("0.01", 1), ("0.03", 2)] and buckets[-2:] == [("300", 2), ("+Inf", 3)]
    assert [s[2] for s in samples if s[0] in ("_sum", "_count") and s[1]["model"] == "m"] == [1000.025, 3]


@pytest.mark.parametrize("tail,tokens", [
    (b'"choices":[],"usage":{"prompt_tokens":12,"total_tokens":20,"completion_tokens":8,"prompt_tokens_details":null},"x":null}', (12, 8)),
    (b'data: {"type":"message_delta","usage": {"input_tokens": 5,"output_tokens":6}}\n\ndata: [DONE]\n\n\r\n0\r\n\r\n', (5, 6)),
    (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', (5, None)),
    (b'{"content":"\\"usage\\":{\\"prompt_tokens\\":5}"}', (None, None)), (b'{"usage":null}', (None, None)), (b"", (None, None)),
])
def test_tokens_are_read_from_the_usage_at_the_end_of_a_reply(tail, tokens):
    assert sc.tokens_of(tail) == tokens


def test_a_client_that_leaves_while_it_is_held_gives_its_place_up(two):
    two.rig.behave("spark1", "alpha", load=20)
    two.post("/api/swap", {"model": "alpha"})
    with socket.create_connection(("127.0.0.1", two.port)) as sock:
        sock.sendall(b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15\r\n\r\n{"prompt": "x"}')
        until(lambda: serves(two)["held"] == 1)
    until(lambda: serves(two)["held"] == 0, 3)


def test_swaps_back_and_forth_under_32_clients_lose_double_and_misroute_nothing(two):
    two.rig.behave("spark1", "*", load=0.1, tokens=5, token_delay=0.02)
    assert two.swap("alpha").status == 200
    ends, told, over = time.monotonic() + float(os.environ.get("SWAP_SECONDS", 5)), [], threading.Event()
    names = {"alpha": ("alpha", "gpt-4o", "org/alpha"), "beta": ("beta", "org/beta")}

    def client(number):
        rng, n = random.Random(number), 0
        while not over.is_set():
            n += 1
            name, chat, key = rng.choice(("alpha", "gpt-4o", "beta", "org/beta", None)), rng.random() < 0.5, f"c{number}-{n}"
            body = {"messages": [{"role": "user", "content": key}], "stream": True} if chat else {"prompt": key}
            got = two.post("/v1/chat/completions" if chat else "/v1/completions", body | ({"model": name} if name else {}))
            told.append((key, name, got))
            if got.status != 200:
                time.sleep(0.02)
    with concurrent.futures.ThreadPoolExecutor(33) as pool:
        clients = [pool.submit(client, number) for number in range(32)]
        swaps = 0
        try:
            while time.monotonic() < ends or swaps < 2:
                assert two.swap("beta" if swaps % 2 == 0 else "alpha").json["phase"] == "ready"
                swaps += 1
        finally:
            over.set()
        for one in clients:
            one.result()
    done = until(lambda: [r for r in two.rig.requests("spark1") if r["path"] != "/v1/completions" or r["body"]["prompt"] != "Hello"])
    served = {}
    for r in done:
        key = r["body"].get("prompt") or r["body"]["messages"][0]["content"]
        assert key not in served, f"{key} was sent to an engine twice"
        served[key] = r
    counts, unnoted = {}, 0
    for key, name, got in told:
        counts[got.status] = counts.get(got.status, 0) + 1
        if got.status == 200:
            text = got.body.decode()
            model = re.search(r'"model":"(\w+)"', text)[1]
            # the pretended engine notes a request after its answer; one that is ended in between leaves no note, and the answer has to do
            noted = served.get(key, {"completed": True, "served": model})
            unnoted += key not in served
            assert noted["completed"] and noted["served"] == model and (name is None or name in names[model])
            pieces = [json.loads(line[6:])["choices"] for line in text.splitlines() if line.startswith("data: {")]
            said = "".join(p[0]["delta"].get("content", "") for p in pieces) if pieces else got.json["choices"][0]["text"]
            assert said == "echo: " + key and (not pieces or text.rstrip().endswith("data: [DONE]"))
        else:
            assert (got.status, got.code) in ((503, "model_leaving"), (503, "model_not_serving"), (503, "swapping")), got.body
            assert got.headers["Retry-After"] and key not in served
    assert counts[200] > 50 and unnoted <= 2 * swaps and len({k for k, _, _ in told}) == len(told)
    until(lambda: (serves(two)["held"], serves(two)["in_flight"]) == (0, 0))


def auto(rig, start, tmp_path, **more):
    p = start(rig_env(rig, tmp_path, AUTO_SWAP="on", **more), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    p.rig = rig
    return p


def ask(p, model):
    return p.post("/v1/completions", {"model": model, "prompt": "x"})


def test_with_auto_swap_requests_start_the_swap_once_and_wait_for_it_together(rig, start, tmp_path):
    p = auto(rig, start, tmp_path)
    assert {"alpha", "beta", "wide"} <= {c["id"] for c in p.get("/v1/models").json["data"]}
    with concurrent.futures.ThreadPoolExecutor(10) as pool:
        got = list(pool.map(lambda n: ask(p, "alpha" if n % 2 else "gpt-4o"), range(10)))
    assert [g.status for g in got] == [200] * 10 and {g.json["model"] for g in got} == {"alpha"}
    [swap] = p.idle()
    assert swap["automatic"] and swap["client"] == "127.0.0.1" and len(launches(rig)) == 1
    # what has just come stays: two clients that alternate do not make the box do so
    for _ in range(3):
        refused = ask(p, "beta")
        assert (refused.status, refused.code) == (503, "serving_too_short") and 60 < int(refused.headers["Retry-After"]) <= 120
        assert ask(p, "alpha").status == 200
    assert len(p.idle()) == 1


def test_an_auto_swap_follows_another_one_and_respects_the_lock(rig, start, tmp_path):
    p = auto(rig, start, tmp_path, MIN_SERVING_SECONDS="0")
    held = lock(p)["token"]
    got = ask(p, "alpha")
    assert (got.status, got.code) == (503, "swap_locked") and got.headers["Retry-After"]
    assert p.call("DELETE", "/api/swap/lock", headers=token(held)).status == 200
    rig.behave("spark1", "alpha", load=1)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = [pool.submit(ask, p, "alpha") for _ in range(2)]
        p.phase("loading")
        second = [pool.submit(ask, p, "beta") for _ in range(2)]
        assert [f.result().json["model"] for f in first + second] == ["alpha", "alpha", "beta", "beta"]
    assert [s["model"] for s in p.idle()] == ["beta", "alpha"]


def test_of_a_refused_request_neither_its_body_nor_a_long_name_is_kept(two):
    rss = lambda: int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{two.process.pid}/status").read_text())[1]) >> 10        # MiB
    before = rss()
    for n in range(8):
        assert two.post("/v1/completions", {"model": "n" * (20 << 20)}).code == "model_not_found"
        assert two.post("/v1/completions", {"model": "nope", "prompt": "x" * (20 << 20)}).code == "model_not_found"
    until(lambda: rss() - before < 100, what="the memory of 320 MiB of refused bodies")
    assert two.get("/api/activity").json["requests"][1]["model"] == "n" * 200


def test_line_ends_without_end_are_no_request(two):
    with socket.create_connection(("127.0.0.1", two.port), 10) as sock:
        sock.sendall(b"\r\nGET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")         # one is: RFC 9112, 2.2
        assert sock.recv(65536).startswith(b"HTTP/1.1 200")
        with contextlib.suppress(OSError):
            for _ in range(50):
                sock.sendall(b"\r\n" * 4096)
        assert b"400" in sock.recv(65536)[:20]


def test_those_who_wait_for_an_auto_swap_that_fails_are_told_and_start_no_other(rig, start, tmp_path):
    p = auto(rig, start, tmp_path)
    assert ask(p, "alpha").status == 200
    rig.behave("spark1", "beta", mode="oom", load=1)
    p.post("/api/swap", {"model": "beta"})
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        got = list(pool.map(lambda _: ask(p, "beta"), range(5)))
    assert {(g.status, g.code) for g in got} == {(503, "swap_failed")} and "memory" in got[0].json["error"]["message"]
    assert [s["model"] for s in p.idle()] == ["alpha", "beta", "alpha"]


def test_where_a_request_goes_follows_from_what_is_served_and_the_swap_that_runs():
    catalog, _ = sc.parse_catalog({"models": {"a": {"repo": "o/a"}, "b": {"repo": "o/b", "aliases": ["bee"]}, "c": {"repo": "o/c"}}}, {}, ())
    slots = {n: sc.Slot(n, ("spark1",), 1, n, "x") for n in ("main", "two")}
    services = {"side": sc.Service("side", "vllm", "spark1", 8000)}
    config = sc.Config(sc.parse_settings({}), {}, catalog, sc.Layout(slots, {}, services), ())
    served = {"main": ("a", "o/a"), "two": (), "service:side": ("gemma",), "service:gone": ("ghost",)}
    loading = sc.Swap("s", "main", "b", phase="checking")

    def told(name, swap=None, held=False, **now):
        try:
            return sc.route_model(name, config, {**served, **now}, swap, held)
        except sc.Refused as e:
            return e.code
    assert [told(n) for n in ("a", "o/a", None, "gemma", "ghost", "bee", "d")] == [
        ("main", False), ("main", False), ("main", False), ("service:side", False), "model_not_found", "model_not_serving", "model_not_found"]
    # while it is checked the old model serves on, and who asks for the new one waits
    assert [told(n, loading) for n in ("a", None, "bee", "c", "gemma")] == [("main", False), ("main", False), ("main", True), "model_not_serving", ("service:side", False)]
    assert [told(n, loading, True) for n in ("a", None, "o/b", "c", "gemma")] == ["model_leaving", ("main", True), ("main", True), "model_not_serving", ("service:side", False)]
    assert told("a", loading, True, two=("a",)) == ("two", False)               # another slot serves it too
    assert told("b", sc.Swap("s", "main", "b", dry_run=True)) == "model_not_serving"
    unload = sc.Swap("s", "main", None, phase="draining")
    assert [told(n, unload, True) for n in ("a", None)] == ["model_leaving", "nothing_served"]


@pytest.fixture
def held():
    """What App.admit works on: slot main, which serves a, is held while a swap brings b."""
    catalog, _ = sc.parse_catalog({"models": {"a": {"repo": "o/a"}, "b": {"repo": "o/b"}}}, {}, ())
    slots = {n: sc.Slot(n, ("spark1",), 1, n, "x") for n in ("main", "two")}
    config = sc.Config(sc.parse_settings({}), {}, catalog, sc.Layout(slots, {}, {}), ())
    app = types.SimpleNamespace(gate=sc.Gate(), monitor=types.SimpleNamespace(served={"main": ("a",)}), store=types.SimpleNamespace(current=config),
                                swaps=types.SimpleNamespace(book=sc.Book(running=sc.Swap("s", "main", "b", phase="draining"))), _parked=threading.BoundedSemaphore(40))
    app.gate.hold("main")
    app.admit = lambda name: sc.App.admit(app, types.SimpleNamespace(gone=lambda: False), name)
    app.parking = lambda: sc.App.parking(app)
    return app


def test_held_requests_go_on_their_way_in_the_order_they_came(held):
    went = []

    def request(n):
        where, ticket = held.admit("b" if n % 2 else None)
        time.sleep(0.002 * (n % 3))                     # sending takes a while
        went.append(n)
        held.gate.step_out(where, ticket)
        held.gate.leave(where)
    with concurrent.futures.ThreadPoolExecutor(40) as pool:
        for n in range(30):
            pool.submit(request, n)
            until(lambda: held.gate.counts("main") == (0, n + 1))
        held.monitor.served, held.swaps.book = {"main": ("b",)}, sc.Book()
        held.gate.release("main")
    assert went == list(range(30)) and held.gate.counts("main") == (0, 0)


def test_who_waited_at_one_slot_and_is_served_by_another_leaves_no_place_in_the_line(held):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waits = pool.submit(held.admit, "b")
        until(lambda: held.gate.counts("main") == (0, 1))
        held.monitor.served = {"main": ("a",), "two": ("b",)}
        assert waits.result(5) == ("two", None)
    assert held.gate.counts("main") == (0, 0) and held.gate.counts("two") == (1, 0)
    held.gate.release("main")
    assert held.gate.enter("main") and all(held._parked.acquire(blocking=False) for _ in range(40))


def test_the_gate_lets_those_who_waited_go_one_by_one_and_newcomers_after_them():
    gate = sc.Gate()
    assert gate.enter("main") and not gate._due
    gate.hold("main")
    assert not gate.enter("main") and gate.drain("main", 0, threading.Event()) == 1
    tickets = [gate.queue("main", False) for _ in range(3)]
    later = gate.queue("main", True)
    gate.release("main")
    assert [t.is_set() for t in tickets] == [True, False, False] and not gate.enter("main", tickets[1]) and not gate.enter("main")
    newcomer = gate.queue("main", False)
    assert gate.enter("main", tickets[0])
    gate.step_out("main", tickets[0])
    assert tickets[1].is_set() and not tickets[2].is_set()
    gate.hold("main")                                   # the next swap came before their turn
    assert not tickets[1].is_set() and not gate.enter("main", tickets[1])
    gate.release("main")
    for ticket in (tickets[1], tickets[2], later, newcomer):
        assert ticket.is_set() and gate.enter("main", ticket)
        gate.step_out("main", ticket)
    assert gate.enter("main") and gate.counts("main") == (7, 0)


def test_the_openai_sdk_works_against_it(two):
    openai = pytest.importorskip("openai") if not CI else __import__("openai")
    assert two.swap("alpha").status == 200
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{two.port}/v1", api_key="none", max_retries=2)
    assert [m.id for m in client.models.list()] == ["alpha", "org/alpha", "gpt-4o"]
    messages = [{"role": "user", "content": "hi"}]
    got = client.chat.completions.create(model="gpt-4o", messages=messages)
    assert got.choices[0].message.content == "echo: hi" and got.usage.completion_tokens == 5
    parts = list(client.chat.completions.create(model="alpha", messages=messages, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in parts if c.choices) == "echo: hi" and parts[-1].usage.completion_tokens == 5
    row = two.get("/api/activity").json["requests"][0]
    assert (row["model"], row["completion_tokens"]) == ("alpha", 5) and row["tokens_per_second"] > 0
    with pytest.raises(openai.NotFoundError) as e:
        client.chat.completions.create(model="nope", messages=messages)
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="alpha", messages=messages, max_tokens=10**9)
    with pytest.raises(openai.APIStatusError):              # what the engine says of what it does not do
        client.embeddings.create(model="alpha", input="x")
    # a refusal with Retry-After is retried by the SDK until the swap is over
    two.rig.behave("spark1", "beta", load=0.5)
    two.post("/api/swap", {"model": "beta"})
    assert client.chat.completions.create(model="beta", messages=messages).model == "beta"
    two.rig.behave("spark1", "beta", tokens=200, token_delay=0.05)
    with pytest.raises(openai.APIError) as e:
        for n, _ in enumerate(client.chat.completions.create(model="beta", messages=messages, stream=True)):
            if n == 3:
                two.rig.kill_engine("spark1")
    assert "ended the stream" in str(e.value)


def test_a_vllm_that_is_a_service_is_reached_by_the_name_of_its_model_for_as_long_as_it_serves(rig, start, tmp_path):
    env, port = rig_env(rig, tmp_path), rig.free_port("spark2")
    (tmp_path / "services.yaml").write_text(f"services: {{gemma: {{kind: vllm, host: spark2, port: {port}}}}}")
    engine = rig.start_foreign("spark2", port, "org/gemma")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    ask = lambda: p.post("/v1/completions", {"model": "org/gemma", "prompt": "x"})
    until(lambda: ask().status == 200, what="the service's model")
    assert [(m["id"], m["slot"]) for m in p.get("/v1/models").json["data"]] == [("org/gemma", "service:gemma")]
    engine.kill()
    until(lambda: ask().code == "model_not_found", what="its end being noticed")


@pytest.mark.parametrize("length", [b"Content-Length: 99999999999999999999999", b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffffffff"])
def test_a_reply_with_an_impossible_length_is_only_a_foreign_one(length):
    answer = OneAnswer(b"HTTP/1.1 200 OK\r\n" + length + b"\r\n\r\nx")
    assert sc.probe_vllm_endpoint(sc.Endpoint("127.0.0.1", answer.port)).state in ("foreign", "silent")
    assert sc.probe_service(sc.Service("s", "asr", health="/health"), sc.Endpoint("127.0.0.1", answer.port))[0] in ("unknown", "unreachable", "down")


# === 14 http ==================================================================

@pytest.fixture
def bare(start, tmp_path):
    """sparkctl with no Spark and an empty catalog."""
    (tmp_path / "none.yaml").touch()
    return start({"MAX_BODY_MB": "1"}, args=("--models", str(tmp_path / "none.yaml"), "--services", str(tmp_path / "none.yaml")))


def test_with_nothing_configured_it_says_what_to_do(bare):
    got = bare.post("/api/swap", {"model": "x"})
    assert (got.status, got.code) == (404, "unknown_model")
    assert bare.post("/api/unload").code == "no_slots"
    assert bare.post("/v1/completions", {"prompt": "x"}).code == "no_slots"
    assert bare.get("/api/state").json["models"] == []


@pytest.mark.parametrize("method,path,body,status,code,words", [
    ("GET", "/api/stat", None, 404, "not_found", "did you mean /api/state?"),
    ("GET", "/api/models/alpa", None, 404, "unknown_model", "did you mean alpha?"),
    ("POST", "/api/swap", {"model": "alpa"}, 404, "unknown_model", "did you mean alpha?"),
    ("POST", "/api/swap", {}, 422, "bad_field", "model is needed"),
    ("POST", "/api/swap", {"model": 7}, 422, "bad_field", "model must be text"),
    ("POST", "/api/swap", {"model": "alpha", "slott": "x"}, 422, "unknown_field", "did you mean slot?"),
    ("POST", "/api/swap", {"model": "alpha", "slot": "x"}, 404, "unknown_slot", "no slot x"),
    ("POST", "/api/swap", {"model": "alpha", "dry_run": "yes"}, 422, "bad_field", "dry_run must be a bool"),
    ("POST", "/api/swap", {"model": "alpha", "skip_checks": ["reachable"]}, 422, "bad_field", "skip_checks must be one of launcher"),
    ("POST", "/api/swap?wait=-1", {"model": "alpha"}, 422, "bad_field", "wait must be a number"),
    ("POST", "/api/swap?wiat=1", {"model": "alpha"}, 422, "unknown_field", "did you mean wait?"),
    ("GET", "/api/state?wait=56", None, 422, "bad_field", "wait must be a number from 0 to 55"),
    ("GET", "/api/swap/nope", None, 404, "unknown_swap", "no swap nope"),
    ("POST", "/api/swap", {"model": "alpha", "note": "\ud800"}, 422, "bad_field", "note must be text"),
    ("POST", "/api/swap", {"model": "\ud800"}, 422, "bad_field", "model must be text"),
    ("POST", "/api/swap", {"\ud800": 1}, 422, "unknown_field", "has no field"),
    ("POST", "/v1/completions", {"model": "\ud800"}, 404, "model_not_found", "does not exist"),
    ("POST", "/v1/completions", {"model": "x" * 400}, 404, "model_not_found", "so long a name"),
    ("GET", "//[", None, 404, "not_found", "there is no path"),
    ("GET", "//x/api/state", None, 404, "not_found", "there is no path"),
    ("GET", "/api/state?" + "&".join(f"a{i}=1" for i in range(60)), None, 400, "bad_request", "too many query fields"),
    ("DELETE", "/api/swap/nope", None, 404, "unknown_swap", "no swap nope"),
    ("PUT", "/api/swap", {}, 405, "method_not_allowed", "use GET, HEAD, POST"),
    ("GET", "/v1/chat/completions", None, 405, "method_not_allowed", "use POST"),
    ("POST", "/api/swap", b'{"model": "a", "model": "b"}', 400, "bad_json", "given twice"),
    ("POST", "/api/swap", b'{"model": ', 400, "bad_json", "not JSON"),
    ("POST", "/api/swap", b'{"model": NaN}', 400, "bad_json", "NaN is not JSON"),
    ("POST", "/api/swap", b"[" * 50000, 400, "bad_json", "nested too deeply"),
    ("POST", "/api/swap", b"\xff\xfe", 400, "bad_json", "not UTF-8"),
    ("POST", "/api/swap", b"[1]", 400, "bad_json", "must be a JSON object"),
    ("POST", "/v1/completions", b"[1]", 400, "bad_json", "must be a JSON object"),
])
def test_bad_input_gets_a_clear_error_and_changes_nothing(two, method, path, body, status, code, words):
    got = two.call(method, path, body)
    assert (got.status, got.code) == (status, code), got.body
    assert words in got.json["error"]["message"] and got.json["error"]["type"] == "invalid_request_error"
    assert got.headers["X-Request-Id"]
    if status == 405:
        assert got.headers["Allow"] == words[4:]
    assert two.get("/api/swap").json == {"running": None, "recent": []}


def raw(port, data, seconds=5, end=True):
    """Send bytes, read until the server closes or is silent for long -> bytes."""
    with socket.create_connection(("127.0.0.1", port), seconds) as sock:
        sock.settimeout(seconds)
        got = b""
        with contextlib.suppress(OSError):
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            while chunk := sock.recv(65536):
                got += chunk
        return got


@pytest.mark.parametrize("data,status", [
    (b"GET / HTTP/1.1\nHost: localhost\n\n\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: b\nC: d\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: b\r\n folded\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    (b"GET /healthz HTTP/2.0\r\nHost: localhost\r\n\r\n", 400),
    (b"GET http://evil/ HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: +2\r\n\r\n{}", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0x2\r\n{}\r\n0\r\n\r\n", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n", 400),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 422),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: 104857600\r\n\r\n", 413),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n6400000\r\n", 413),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nA: " + b"b" * 40000 + b"\r\n\r\n", 431),
    (b"GET /healthz HTTP/1.0\r\n\r\n", 200),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
])
def test_a_malformed_or_oversized_request_is_refused_and_the_connection_closed(bare, data, status):
    got = raw(bare.port, data)
    assert got.startswith(b"HTTP/1.1 %d " % status), got[:200]
    assert got.count(b"HTTP/1.1 ") == 1
    if status in (400, 413, 431):
        assert b"\r\nConnection: close\r\n" in got


@pytest.fixture
def impatient(tmp_path, monkeypatch):
    """A server in this process whose limits are a fraction of a second -> its port."""
    for name, seconds in (("HEAD_S", 0.3), ("BODY_S", 0.3), ("IDLE_S", 0.6), ("PARKED_MAX", 2)):
        monkeypatch.setattr(sc, name, seconds)
    (tmp_path / "none.yaml").touch()
    store = sc.ConfigStore(sc.parse_settings({}), {"models": str(tmp_path / "none.yaml"), "overrides": "/nonexistent", "services": str(tmp_path / "none.yaml")})
    app = sc.App(store, str(tmp_path))
    server = sc.Server(("127.0.0.1", 0), app)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.finish(2)
    app.hosts.close()


def test_those_who_wait_leave_connections_for_those_who_do_not(impatient):
    def ask(path, end=True):
        return raw(impatient, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode(), end=end)
    version = json.loads(ask("/api/state").partition(b"\r\n\r\n")[2])["version"]
    with contextlib.ExitStack() as stack:
        def no_place_is_left():
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", impatient), 5))
            sock.sendall(f"GET /api/state?since={version}&wait=50 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return b"too_many_waiting" in ask(f"/api/state?since={version}&wait=0.1")
        until(no_place_is_left)
        assert ask("/api/state").startswith(b"HTTP/1.1 200") and ask("/api/connectivity").startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("data,answer", [
    (b"", b""), (b"GET /healthz HT", b"HTTP/1.1 408 "),
    (b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{", b"HTTP/1.1 408 "),
    (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200 "),
])
def test_a_slow_sender_and_an_idle_connection_are_let_go(impatient, data, answer):
    got = raw(impatient, data, end=False)          # until the server closes
    assert got.startswith(answer) and got.count(b"HTTP/1.1 ") == bool(answer)


def test_expect_100_continue_is_answered_and_a_pipelined_request_too(bare):
    head = b"POST /api/swap HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
    with socket.create_connection(("127.0.0.1", bare.port), 5) as sock:
        sock.sendall(head)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"{}")
        assert sock.recv(4096).startswith(b"HTTP/1.1 422 ")
    two_at_once = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2
    assert raw(bare.port, two_at_once).count(b"HTTP/1.1 200 ") == 2


def test_head_is_get_without_the_body(bare):
    got = raw(bare.port, b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b"Content-Length: 3" in head and body == b""


@pytest.mark.parametrize("host,ok", [
    ("localhost:9999", True), ("127.0.0.1", True), ("[::1]:9999", True), ("192.168.1.5:80", True), ("spark-ctl.local", True), ("named.example", True),
    ("[::1]evil.example", False), ("[127.0.0.1]evil.com", False), ("evil.example", False), ("localhost.evil.example", False), ("", False), ("x.local.evil.com", False), ("127.0.0.1.evil.com", False),
])
def test_only_our_own_names_are_answered_to(host, ok):
    assert sc.host_allowed(host, ("named.example",)) is ok


def test_a_refused_host_is_421_even_for_the_page(bare):
    assert bare.get("/", headers={"Host": "evil.example"}).status == 421
    assert bare.get("/healthz", headers={"Host": socket.gethostname()}).status == 200


def test_a_header_full_of_blanks_costs_no_more_than_another():
    with pytest.raises(sc.Refused, match="malformed header field"):
        sc.parse_head(b"GET / HTTP/1.1\r\nA:" + b" " * 30_000 + b"\x01")       # with a pattern that tries again and again it would take hours
    request, _ = sc.parse_head(b"GET / HTTP/1.1\r\nA: \t b c \t")
    assert request.headers["a"] == "b c"


def test_a_page_of_another_site_may_not_even_make_the_sparks_work(bare):
    for path in ("/api/health/deep", "/api/connectivity", "/api/state"):
        assert bare.get(path, headers={"Sec-Fetch-Site": "cross-site"}).status == 403 and bare.get(path, headers={"Sec-Fetch-Site": "same-origin"}).status == 200
    assert bare.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status == 200


@pytest.mark.parametrize("headers,status", [
    ({}, 404), ({"Sec-Fetch-Site": "same-origin"}, 404), ({"Sec-Fetch-Site": "none"}, 404),
    ({"Sec-Fetch-Site": "cross-site"}, 403), ({"Sec-Fetch-Site": "same-site"}, 403),
    ({"Origin": "http://["}, 403), ({"Origin": "http://evil.example"}, 403), ({"Origin": "null"}, 403), ({"Origin": "http://localhost:1"}, 403),
    ({"Origin": "http://localhost:{port}"}, 404), ({"Origin": "http://localhost:{port}", "Sec-Fetch-Site": "cross-site"}, 403),
])
def test_a_page_of_another_origin_may_not_write(bare, headers, status):
    headers = {k: v.format(port=bare.port) for k, v in headers.items()} | {"Host": f"localhost:{bare.port}"}
    assert bare.post("/api/swap", {"model": "x"}, headers=headers).status == status


def test_with_a_key_set_only_the_page_and_healthz_are_open(start, tmp_path):
    p = start({"SPARKCTL_API_KEY": "k3y"})
    assert [p.get(path).status for path in ("/healthz", "/")] == [200, 200]
    assert [p.get(path).status for path in ("/api/state", "/api/nothing", "/v1/models", "/api/swap/x/stream")] == [401] * 4
    assert p.get("/api/state", headers={"Authorization": "Bearer wrong"}).code == "key_refused"
    assert p.get("/api/state", headers={"Authorization": "Bearer k3y"}).status == 200
    assert "k3y" not in p.said()


def test_the_page_is_served_with_a_strict_policy_whose_hashes_are_its_own(bare):
    got = bare.get("/")
    policy = got.headers["Content-Security-Policy"]
    assert "unsafe-inline" not in policy and "default-src 'none'" in policy
    for tag in ("script", "style"):
        [content] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), got.body, re.S)
        assert base64.b64encode(hashlib.sha256(content).digest()).decode() in policy
    for pattern in (r"innerHTML", r"insertAdjacentHTML", r"\son\w+=\"", r"\sstyle=\"", r"(?<!xmlns=\")https?://(?!127|localhost|www\.w3\.org/)[\w.]+"):
        assert not re.search(pattern, got.body.decode()), pattern


def test_a_long_poll_parks_until_something_changes_and_answers_then(two):
    version = two.get("/api/state").json["version"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        parked = pool.submit(two.get, f"/api/state?since={version}&wait=30")
        until(lambda: two.get("/api/state").json["version"] != version or two.post("/api/swap", {"model": "alpha", "dry_run": True}))
        assert parked.result(10).json["version"] != version
    newest = two.get("/api/swap").json["recent"]
    assert two.get("/api/state?since=another-boot.7&wait=30").json["version"]
    assert newest is not None


def test_a_swap_can_be_waited_for_by_change_and_to_its_end(two):
    two.rig.behave("spark1", "alpha", load=1)
    swap = two.post("/api/swap", {"model": "alpha"}).json
    later = two.get(f"/api/swap/{swap['id']}?since={swap['seq']}&wait=10").json
    assert later["seq"] > swap["seq"]
    assert two.get(f"/api/swap/{swap['id']}?wait=30").json["phase"] == "ready"
    late = two.post("/api/swap?wait=0", {"model": "beta"})
    assert late.status == 504 and late.json["still_running"] is True


def test_an_already_served_model_is_409_or_200_for_whoever_waits_and_restart_loads_it_again(two):
    first = two.swap("alpha").json
    got = two.post("/api/swap", {"model": "alpha"})
    assert (got.status, got.code) == (409, "already_serving")
    got = two.swap("alpha")
    assert got.status == 200 and got.json["already_serving"] is True and got.json["phase"] == "ready" and got.json["id"] == first["id"]
    assert two.swap("alpha", restart=True).json["id"] != first["id"]


def events_of(program, path, last=None):
    got = program.get(path, headers={"Last-Event-ID": last} if last else {})
    out = []
    for block in got.body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if ": " in line and not line.startswith(":"))
        if "event" in fields:
            out.append((fields["event"], fields["id"], json.loads(fields["data"])))
    return got.status, out


def test_the_stream_of_a_swap_has_phases_log_progress_and_an_end_and_resumes_exactly(two):
    swap = two.post("/api/swap", {"model": "alpha"}).json
    status, events = events_of(two, f"/api/swap/{swap['id']}/stream")
    kinds = [e[0] for e in events]
    assert status == 200 and kinds[-1] == "end" and {"phase", "log", "progress"} <= set(kinds)
    assert [e[2]["phase"] for e in events if e[0] == "phase"] == ["queued", "checking", "draining", "stopping", "launching", "loading", "warming", "ready"]
    logged = [e[2]["n"] for e in events if e[0] == "log"]
    assert logged == list(range(1, len(logged) + 1)) and events[-1][2]["phase"] == "ready"
    middle = [e for e in events if e[0] == "log"][len(logged) // 2]
    _, rest = events_of(two, f"/api/swap/{swap['id']}/stream", middle[1])
    assert [e[2]["n"] for e in rest if e[0] == "log"] == logged[len(logged) // 2 + 1:]
    assert events_of(two, f"/api/swap/{swap['id']}/stream", events[-1][1]) == (204, [])


def test_the_history_and_the_logs_survive_a_restart(two):
    swap = two.swap("alpha").json
    before = events_of(two, f"/api/swap/{swap['id']}/stream")
    two.restart(signal.SIGTERM)
    after = two.get(f"/api/swap/{swap['id']}").json
    assert after == swap
    assert [e[2] for e in events_of(two, f"/api/swap/{swap['id']}/stream")[1] if e[0] == "log"] == [e[2] for e in before[1] if e[0] == "log"]
    assert any(e["kind"] == "swap_complete" for e in two.get("/api/events").json["events"])


def test_every_request_leaves_one_line_without_secrets_in_the_log(start, tmp_path):
    p = start({"SPARKCTL_API_KEY": "k3y"})
    got = p.get("/api/state?since=s3cret&wait=0", headers={"Authorization": "Bearer k3y"})
    line = until(lambda: [l for l in p.said().splitlines() if got.headers["X-Request-Id"] in l])
    assert len(line) == 1 and "GET /api/state 200" in line[0] and "s3cret" not in line[0] and "k3y" not in p.said()


def test_too_many_connections_are_told_to_come_back_and_one_client_cannot_take_them_all(bare):
    def connect(client, times):
        for _ in range(times):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", bare.port), 5, (client, 0)))
        return sock
    with contextlib.ExitStack() as stack:
        connect("127.0.0.2", sc.CLIENT_MAX - 1)
        for client, free in (("127.0.0.2", 1), ("127.0.0.3", sc.CONNECTIONS_MAX - sc.CLIENT_MAX)):
            last = connect(client, free)
            last.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert last.recv(4096).startswith(b"HTTP/1.1 200 ")
            assert b"too_many_connections" in connect(client, 1).recv(4096)
    until(lambda: raw(bare.port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200"))


def test_a_slot_that_came_into_the_file_together_with_an_edit_is_watched_too(start, tmp_path):
    for name in ("m.yaml", "s.yaml"):
        (tmp_path / name).touch()
    p = start({"SPARK1_HOST": "local", "POLL_SECONDS": "1"}, args=("--models", str(tmp_path / "m.yaml"), "--services", str(tmp_path / "s.yaml")))
    (tmp_path / "s.yaml").write_text("slots: {other: {port: 1}}")
    assert p.post("/api/models", {"key": "x", "repo": "a/b"}).status == 201         # most likely before the thread `config` looks
    assert until(lambda: (slot := serves(p))["state"] == "empty" and slot["name"] == "other")


# --- settings

def put(program, expect=200, headers=(), **values):
    got = program.call("PUT", "/api/settings", values, headers=dict(headers))
    assert got.status == expect, got.body
    return got.json if expect == 200 else (got.code, got.json["error"]["message"])


def setting(reply, name):
    return next(row for row in reply["settings"] if row["name"] == name)


def test_settings_are_changed_at_once_or_at_the_next_start_as_told(start, tmp_path):
    (tmp_path / "none.yaml").touch()
    p = start({"VLLM_PORT": "7777"}, args=("--models", str(tmp_path / "none.yaml"), "--services", str(tmp_path / "none.yaml")))
    there = {"Host": "sparks.example"}
    assert p.get("/api/state", headers=there).status == 421
    got = put(p, SWAP_DRAIN_SECONDS=5, SWAP_ROLLBACK=False, DISABLED_SERVICES=["a", "b"], SPARK1_HOST="local", SPARKCTL_ALLOWED_HOSTS="sparks.example")
    assert got["restart_needed"] == ["SPARK1_HOST"] and setting(got, "SPARK1_HOST")["restart"] and not setting(got, "SWAP_ROLLBACK")["restart"]
    assert [setting(got, n)["value"] for n in ("SWAP_DRAIN_SECONDS", "SWAP_ROLLBACK", "DISABLED_SERVICES")] == [5.0, False, "a,b"]
    assert setting(got, "VLLM_PORT")["pinned"] and not setting(got, "SPARKCTL_ALLOWED_HOSTS")["pinned"]
    assert p.get("/api/state", headers=there).json["sparks"] == []
    assert yaml.safe_load((p.data / "settings.yaml").read_text()) == {"SWAP_DRAIN_SECONDS": 5, "SWAP_ROLLBACK": False, "DISABLED_SERVICES": ["a", "b"],
                                                                      "SPARK1_HOST": "local", "SPARKCTL_ALLOWED_HOSTS": "sparks.example"}
    event = p.get("/api/events").json["events"][0]
    assert (event["kind"], event["client"], event["names"][0]) == ("settings_changed", "127.0.0.1", "DISABLED_SERVICES")
    got = put(p, SWAP_DRAIN_SECONDS=None, SWAP_ROLLBACK="", SPARKCTL_ALLOWED_HOSTS=None)
    assert (setting(got, "SWAP_DRAIN_SECONDS")["value"], setting(got, "SWAP_ROLLBACK")["source"]) == (30.0, "default")
    p.restart()
    assert p.get("/api/settings").json["restart_needed"] == [] and p.get("/api/state").json["sparks"][0]["name"] == "spark1"
    (p.data / "settings.yaml").write_text("HOLD_SECONDS: 7\nSPARK1_HOST: local")
    until(lambda: setting(p.get("/api/settings").json, "HOLD_SECONDS")["value"] == 7)
    (p.data / "settings.yaml").write_text("HOLD_SECONDS: [")
    until(lambda: any("settings.yaml" in w for w in p.get("/api/state").json["warnings"]))
    assert setting(p.get("/api/settings").json, "HOLD_SECONDS")["value"] == 7 and put(p, 409, HOLD_SECONDS=8)[0] == "settings_broken"


def test_a_setting_that_makes_no_sense_is_refused_in_words_and_nothing_is_written(bare):
    for body, status, code, words in (
            ({"SWAP_DRAN_SECONDS": 5}, 422, "unknown_field", "did you mean SWAP_DRAIN_SECONDS?"), ({"HOLD_SECONDS": "soon"}, 422, "bad_field", "must be a number from 0"),
            ({"HOLD_SECONDS": {"a": 1}}, 422, "bad_field", "must be text, a number"), ({"DISABLED_SERVICES": [["a"]]}, 422, "bad_field", "must be text, a number"),
            ({"SPARKCTL_DATA": "/x"}, 422, "bad_field", "says where settings.yaml is"), ({"LAUNCH_DIR": "a\nb"}, 422, "bad_field", "control characters"),
            ({"SPARK1_HOST": "-oProxyCommand=id"}, 422, "bad_field", "host name"), ({"SPARKCTL_API_KEY": "hush\x07"}, 422, "bad_field", "control characters"),
            ({"WEBHOOK_URL": "ftp://hush"}, 422, "bad_field", "must be addresses"), ({"LOCAL_MODEL_ROOTS": "/a/../b"}, 422, "bad_field", "not an absolute"),
            ({"SPARKCTL_BIND": "127.0.0.999"}, 422, "bad_field", "is not an address of this machine"), ({"MODELS_OVERRIDES": "settings.yaml"}, 422, "bad_field", "of its own"),
            ({"MODELS_OVERRIDES": "/nonexistent/x.yaml"}, 422, "bad_field", "that exists"), ({"SPARKCTL_API_KEY": False}, 422, "bad_field", "must be text"),
            ({"OPEN_WEBUI_URL": "http://127.0.0.1:1,"}, 422, "bad_field", "must be one address"),
            ({"MAX_BODY_MB": 2}, 409, "pinned", "MAX_BODY_MB comes from the environment"), ({"SPARKCTL_PORT": 1}, 409, "pinned", "command line"),
            ({"HOLD_SECONDS": 5, "NOPE": 1}, 422, "unknown_field", "NOPE")):
        got = bare.call("PUT", "/api/settings", body)
        assert (got.status, got.code) == (status, code) and words in got.json["error"]["message"] and b"hush" not in got.body, got.body
    assert bare.call("PUT", "/api/settings", {"HOLD_SECONDS": 1}, headers={"Origin": "http://evil.example"}).status == 403
    assert not (bare.data / "settings.yaml").exists() and bare.get("/api/events").json["events"][0]["kind"] == "started"
    (bare.data / "settings.yaml").mkdir()
    assert put(bare, 503, HOLD_SECONDS=5)[0] == "settings_unwritable"


def test_a_secret_is_set_and_never_told_and_an_api_key_counts_from_the_next_request_on(bare):
    version = bare.get("/api/state").json["version"]
    told = bare.call("PUT", "/api/settings", {"SPARKCTL_API_KEY": "s3cret one", "WEBHOOK_SECRET": "s3cret", "VLLM_API_KEY": "s3cret"})
    assert told.status == 200 and setting(told.json, "SPARKCTL_API_KEY")["value"] == "set"
    assert bare.get(f"/api/state?since={version}").status == 401
    auth = {"Authorization": "Bearer s3cret one"}
    shown = bare.get("/api/state", headers=auth).body + bare.get("/api/events", headers=auth).body + told.body
    assert b"s3cret" not in shown and "s3cret" not in bare.said() and (bare.data / "settings.yaml").stat().st_mode & 0o777 == 0o600
    assert put(bare, headers=auth, SPARKCTL_API_KEY=None)["restart_needed"] == [] and bare.get("/api/state").status == 200


def test_on_an_open_address_without_a_key_strangers_cannot_change_what_runs_or_who_may_ask(tmp_path):
    def app_of(values=(), **env):
        (tmp_path / "none.yaml").touch()
        paths = {name: str(tmp_path / "none.yaml") for name in ("models", "overrides", "services")} | {"settings": str(tmp_path / "settings.yaml")}
        parse = functools.partial(sc.parse_settings, env)
        return sc.App(sc.ConfigStore(parse(dict(values)), paths, parse), str(tmp_path))

    def ask(app, **values):
        request = sc.Request("PUT", "/api/settings", 1, [])
        request.body, request.client = json.dumps(values).encode(), "10.0.0.9"
        try:
            return sc.put_settings(app, request)[0]
        except sc.Refused as e:
            return e.status, e.code
    app, guarded = app_of(SPARKCTL_BIND="0.0.0.0"), [s.name for s in sc.SETTINGS if s.guarded and s.name != "SPARKCTL_DATA"]
    assert {"SPARK1_HOST", "SPARK8_USER", "LAUNCH_DIR", "MODELS_OVERRIDES", "LOCAL_MODEL_ROOTS", "WEBHOOK_URL", "SPARKCTL_API_KEY", "SPARKCTL_BIND"} <= set(guarded)
    for name in guarded:
        assert ask(app, **{name: "http://x" if name == "WEBHOOK_URL" else "/x" if name == "LOCAL_MODEL_ROOTS" else "x"}) == (403, "setting_protected"), name
    assert ask(app, HOLD_SECONDS=5) == 200 and any("set SPARKCTL_API_KEY" in w for w in app.state()["warnings"])
    app.hosts.close()
    app = app_of({"SPARKCTL_BIND": "0.0.0.0"})              # and the file says loopback since, for the next start
    assert app.store.settings["SPARKCTL_BIND"] == "127.0.0.1" and ask(app, LAUNCH_DIR="/x") == (403, "setting_protected")
    app.hosts.close()
    app = app_of(SPARKCTL_BIND="0.0.0.0", SPARKCTL_API_KEY="k")
    assert ask(app, LAUNCH_DIR="/x") == 200 and not any("set SPARKCTL_API_KEY" in w for w in app.state()["warnings"])
    app.hosts.close()


# === 15 demo ==================================================================

def test_the_demo_shows_a_swap_a_failure_with_rollback_and_answers_chat(start, tmp_path):
    p = start(args=("--demo",))
    state = p.get("/api/state").json
    until(lambda: serves(p)["state"] == "empty")
    assert len(state["slots"]) == 1 and len(state["sparks"]) == 2 and state["warnings"] == []
    assert {m["mode"] for m in state["models"]} == {"solo", "cluster"} and any("local_path" in m for m in state["models"])
    assert p.swap("tiny-chat").status == 200
    got = p.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hello there"}]})
    assert "hello there" in got.json["choices"][0]["message"]["content"]
    assert errors_of(p.swap("too-greedy").json)[0] == "check_failed" and serves(p)["model"] == "tiny-chat"        # what fits and what does not
    failed = p.swap("bad-luck")
    assert failed.status == 502 and errors_of(failed.json)[0] == "kv_cache_too_small"
    assert p.idle()[0]["rollback_of"] == failed.json["id"]
    for model in ("wide-chat", "house-style"):
        assert p.swap(model).status == 200
    engine = int(re.search(r"pid=(\d+)", (next(Path(p.dir).glob("data/engines-*/demo-engine.log"), None) or Path(find_log(p))).read_text())[1])
    p.kill()
    until(lambda: not alive(engine), what="the end of the engine after its sparkctl")


def test_the_demo_has_sparks_with_a_gpu_and_services_that_work(start):
    p = start({"POLL_SECONDS": "1"}, args=("--demo",))
    until(lambda: [t["state"] for t in tiles(p).values()] == ["serving"] * 3 and all((s["gpu"] or {}).get("power_w") == 25 for s in spark_state(p).values()), 30)
    assert {kind: set(t["facts"]) for kind, t in tiles(p).items()} == {"embeddings": {"model"}, "kokoro": {"voices"}, "qdrant": {"collections"}}
    assert all(s["detail"] == "" and len(s["containers"]) == 3 for s in spark_state(p).values())
    assert p.get("/api/health/deep").json["ok"] and p.get("/api/connectivity").json["ok"]
    until(lambda: b"GET /readyz" in (said := p.get("/api/services/qdrant/logs").body) and b"/v1/audio" not in said)
    followed = p.post("/api/services/kokoro/restart?follow=true").body.decode().splitlines()
    assert (followed[0], followed[-1]) == ("-- docker restarts container kokoro on spark2", "-- container kokoro on spark2 was restarted")
    assert p.post("/api/services/qdrant/restart").json["detail"] == "container qdrant on spark2 was restarted"
    assert p.post("/api/swap?wait=30", {"model": "tiny-chat"}).status == 200 and p.post("/v1/completions", {"prompt": "hi"}).status == 200
    facts = until(lambda: (f := serves(p)["facts"]).get("tokens_per_s") is not None and f)
    assert facts["running"] == 0 and facts["kv_use"] == 0 and p.post("/tokenize", {"prompt": "hi"}).status == 404


def find_log(program):
    """The demo's engine log: its directory is in the slot's command line."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"SPARKCTL_DEMO_PID={program.process.pid}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                for fd in (1, 2):
                    target = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if target.endswith("demo-engine.log"):
                        return target
    raise AssertionError("no demo engine runs")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# === 16 command line ==========================================================

def run_once(*args, env=None, timeout=20):
    clean = {k: v for k, v in os.environ.items() if k not in sc.SETTING}
    return subprocess.run([sys.executable, str(HERE / "sparkctl.py"), *args], env={**clean, **(env or {})}, capture_output=True, text=True, timeout=timeout)


def test_a_port_in_use_is_one_line_and_exit_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        got = run_once("--port", str(s.getsockname()[1]), "--data", str(tmp_path))
    assert got.returncode == 2 and "Address already in use" in got.stderr and got.stderr.count("\n") == 1


def test_a_data_directory_that_cannot_be_used_is_one_line_and_exit_2(tmp_path):
    (tmp_path / "file").touch()
    got = run_once("--data", str(tmp_path / "file" / "data"))
    assert got.returncode == 2 and "data directory" in got.stderr and got.stderr.count("\n") == 1


def test_check_prints_settings_as_the_readme_has_them_and_creates_nothing(tmp_path):
    got = run_once("check", "--data", str(tmp_path / "none" / "data"), env={"SPARK1_HOST": "a"})
    assert (got.returncode, got.stderr) == (0, "") and not list(tmp_path.iterdir())
    for line in ("SWAP_ROLLBACK = on ", "AUTO_SWAP = off ", "HOLD_SECONDS = 60 ", "SWAP_LOAD_TIMEOUT = 1800 "):
        assert line in got.stdout


def test_root_on_an_open_address_is_refused_unless_told(tmp_path):
    if os.geteuid():
        assert "root" not in run_once("check").stderr
        return
    got = run_once("--bind", "0.0.0.0", "--port", "0", "--data", str(tmp_path))
    assert got.returncode == 2 and "--allow-root" in got.stderr


def test_a_second_program_on_the_same_data_directory_is_refused(bare):
    got = run_once("--port", "0", "--data", str(bare.data))
    assert got.returncode == 2 and "another sparkctl uses this data directory" in got.stderr


def test_a_standard_error_that_cannot_be_written_stops_nothing(start, tmp_path):
    p = start(args=("--demo",), wait=False)
    p.kill()
    p.process = subprocess.Popen([sys.executable, str(HERE / "sparkctl.py"), "--demo", "--port", "0"], stdout=subprocess.PIPE, stderr=open("/dev/full", "wb"))
    p.port = int(re.search(r":(\d+)/", p.process.stdout.readline().decode())[1])
    assert p.swap("tiny-chat").status == 200
    assert p.kill(signal.SIGTERM) == 0


@pytest.mark.parametrize("args", [["--port", "abc"], ["--port", "99999"], ["--prot", "1"], ["serv"]])
def test_a_mistake_on_the_command_line_is_exit_2(args):
    got = run_once(*args)
    assert got.returncode == 2 and "error:" in got.stderr


def test_without_pyyaml_one_line_says_what_to_install(tmp_path):
    (tmp_path / "yaml.py").write_text("raise ImportError")
    got = run_once(env={"PYTHONPATH": str(tmp_path)})
    assert got.returncode == 1 and "apt-get install -y python3-yaml" in got.stderr and got.stderr.count("\n") == 1


def test_what_a_crash_left_of_a_state_file_is_swept_at_the_next_start(bare):
    (bare.data / ".tmp-abc").touch()
    bare.restart()
    assert not (bare.data / ".tmp-abc").exists()


def test_sigterm_lets_a_reply_in_flight_end_and_leaves_the_engine_running(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "alpha", tokens=30, token_delay=0.05)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reply = pool.submit(two.post, "/v1/chat/completions", {"model": "alpha", "stream": True, "messages": [{"role": "user", "content": "x"}]})
        until(lambda: serves(two)["in_flight"] == 1)
        assert two.kill(signal.SIGTERM) == 0
        assert b"[DONE]" in reply.result(10).body
    assert len(two.rig.engines("spark1")) == 1


def test_recipes_are_printed_to_paste_or_written_and_each_that_fails_is_named(tmp_path):
    files = {"Nemotron 3.YAML": RECIPE, "good.yml": "command: vllm serve a/b --x 1", "again/good.yaml": "command: vllm serve c/d", "bad.yaml": "command: vllm serve a/b {x}",
             "broken.yaml": "command: [", "twin.yaml": "command: vllm serve org/one", "ü.yaml": "command: vllm serve a/u"}
    for name, said in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(said)
    (tmp_path / "m.yaml").write_text("models: {one: {repo: org/one}}")

    def run(*args, names=tuple(files)):
        return run_once("import-recipe", *(str(tmp_path / n) for n in names), "--models", str(tmp_path / "m.yaml"), *args, env={"SPARKCTL_DATA": str(tmp_path / "d")})
    got = run()
    assert got.returncode == 1, got
    models, problems = sc.parse_catalog({"models": yaml.load(got.stdout, sc.LoudLoader)}, {}, ROOTS)
    assert problems == [] and sorted(models) == ["good", "nemotron-3", "twin"]
    for name, words in (("Nemotron 3.YAML", "'container' is given twice; the last one counts"), ("again/good.yaml", "not imported: good was imported from another file"),
                        ("bad.yaml", "not imported: the command's '{x}'"), ("broken.yaml", "not imported: line 1"), ("twin.yaml", "org/one is claimed by one too"),
                        ("ü.yaml", "not imported")):
        assert re.search(re.escape(f"{tmp_path}/{name}: ") + ".*" + re.escape(words), got.stderr), (name, got.stderr)
    assert "# line" in got.stdout and "build_args: --tf5" in got.stdout and not (tmp_path / "d" / "models-overrides.yaml").exists()
    assert run("--write", names=("good.yml", "twin.yaml")).returncode == 1
    store = yaml.safe_load((tmp_path / "d" / "models-overrides.yaml").read_text())
    assert list(store["models"]) == ["good"] and store["models"]["good"]["knobs"] == {"x": 1}
    again = run("--write", names=("good.yml",))
    assert again.returncode == 1 and "there is a model good already" in again.stderr
    assert run(names=("good.yml",)).returncode == 0 and run(names=("good.yml", "none.yaml", "bad.yaml")).returncode == 2
    for wrong in (["import-recipe"], ["check", "x.yaml"], ["--write"]):
        assert run_once(*wrong).returncode == 2


# === a real sshd ==============================================================

@pytest.fixture
def sshd(rig, tmp_path, monkeypatch):
    """A real sshd on loopback, whose logins land in the rig's spark1; ~/.ssh/config gives it an alias."""
    program = shutil.which("sshd") or "/usr/sbin/sshd"
    need(os.path.exists(program) and shutil.which("ssh-keygen"), "openssh-server")
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)], check=True, timeout=20)
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    env = rig.env("spark1")
    setenv = " ".join(f"{k}={sc.quote_arg(v)}" for k, v in env.items() if k.startswith(("RIG", "SPARK_ADDRESS")) or k in ("HOME", "PATH"))
    (home / "sshd_config").write_text(textwrap.dedent(f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {home}/host
        AuthorizedKeysFile {home}/user.pub
        PidFile none
        StrictModes no
        UsePAM no
        PasswordAuthentication no
        ForceCommand cd {env['HOME']}; exec env {setenv} sh -c "$(printf '%s' "$SSH_ORIGINAL_COMMAND" | sed 's|/proc/meminfo|{rig.spark('spark1')}/meminfo|g')"
        """))
    (home / "known_hosts").write_text(f"[127.0.0.1]:{port} {(home / 'host.pub').read_text()}")
    (home / "config").write_text(textwrap.dedent(f"""
        Host my-spark
          HostName 127.0.0.1
          Port {port}
          User {pwd.getpwuid(os.getuid()).pw_name}
          IdentityFile {home}/user
          IdentitiesOnly yes
          UserKnownHostsFile {home}/known_hosts
        Host stranger
          HostName 127.0.0.1
          Port {port}
          IdentityFile {home}/user
          UserKnownHostsFile /dev/null
        """))
    # ssh takes its configuration from the passwd entry's home, not from $HOME: hand it over on the command line
    real = shutil.which("ssh")
    (home / "bin").mkdir()
    (home / "bin/ssh").write_text(f'#!/bin/sh\nexec {real} -F {home}/config "$@"\n')
    (home / "bin/ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    server = subprocess.Popen([program, "-D", "-e", "-f", str(home / "sshd_config")], stderr=open(home / "sshd.log", "wb"))
    until(lambda: "Server listening" in (home / "sshd.log").read_text())
    server.home = home
    server.path = f"{home / 'bin'}:{os.environ['PATH']}"
    yield server
    server.terminate()
    server.wait(10)


def test_over_a_real_sshd_calls_are_multiplexed_and_failures_told_apart(sshd):
    hosts = sc.Hosts([sc.Spark("spark1", "my-spark"), sc.Spark("spark2", "stranger"), sc.Spark("spark3", "my-spark", "nobody-there")])
    try:
        assert hosts.run("spark2", "true", 10).kind == "unknown_host_key"       # first: a shared connection needs no key
        assert hosts.address("spark1") == "127.0.0.1"
        for i in range(5):
            assert hosts.run("spark1", f"echo {i}", 10).out == f"{i}\n"
        assert (sshd.home / "sshd.log").read_text().count("Accepted publickey") == 1
        assert hosts.run("spark3", "true", 10).kind == "refused_login"
        [control] = os.listdir(hosts.control_dir)
        stale = os.path.join(hosts.control_dir, control)
        subprocess.run(["pkill", "-9", "-f", f"ssh: {stale}"], timeout=5, check=True)       # the master dies without its socket
        until(lambda: not subprocess.run(["pgrep", "-f", f"ssh: {stale}"], capture_output=True, timeout=5).stdout)
        assert hosts.run("spark1", "echo healed", 10).out == "healed\n"
        assert hosts.run("spark1", "echo again", 10).out == "again\n"
        assert (sshd.home / "sshd.log").read_text().count("Accepted publickey") <= 3
    finally:
        hosts.close()


def test_a_whole_swap_runs_over_a_real_sshd(rig, sshd, start, tmp_path):
    env = rig_env(rig, tmp_path, SPARK1_HOST="my-spark", SPARK2_HOST="", PATH=sshd.path, SWAP_STOP_TIMEOUT="60")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    rig.cluster("spark1", "spark1")
    got = p.swap("alpha")
    assert got.status == 200, got.json["error"]
    got = p.swap("fancy")
    assert got.status == 200, got.json["error"]
    assert p.post("/v1/completions", {"model": "fancy", "prompt": "x"}).status == 200
    assert (sshd.home / "sshd.log").read_text().count("Accepted publickey") <= 3
    p.kill(signal.SIGTERM)


# === the page, in a real browser ==============================================

@pytest.fixture(scope="module")
def browser():
    """Headless Chromium over its DevTools pipe would be more code than a driver; playwright drives Debian's own."""
    playwright = pytest.importorskip("playwright.sync_api") if not CI else __import__("playwright.sync_api").sync_api
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    need(program, "chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"])
        yield chromium
        chromium.close()


def open_page(browser, program, canned=None, **context):
    """The program's page; canned: what /api/state answers instead of the program."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context}).new_page()
    page.set_default_timeout(20000)
    page.errors = []
    page.on("pageerror", lambda e: page.errors.append(str(e)))
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" and "Failed to load resource" not in m.text and "ERR_" not in m.text else None)
    if canned is not None:
        def answer(route):
            if f"since={canned['version']}" not in route.request.url:
                route.fulfill(json=canned)          # else it is parked: never answered
        page.route("**/api/state*", answer)
    page.goto(f"http://127.0.0.1:{program.port}/")
    return page


def row(page, name):
    return page.locator("#list > li", has_text=name)


def sees(page, text):
    page.get_by_text(text).first.wait_for()


def no_errors(page):
    assert page.errors == []
    page.context.close()


def canned(program, **more):
    """The program's state with a slot that serves, two full Sparks, services, a plan for the day."""
    s = program.get("/api/state").json
    gb = {"total_gb": 121.7, "available_gb": 40.0, "free_gb": 20.0, "page_cache_gb": 20.0, "unknown_gb": 2.0, "others": {"jupyter": 4.0}, "services": {"parakeet": 6.1}}
    for spark in s["sparks"]:
        spark.update(gpu={"busy": 73, "power_w": 74, "temperature_c": 61}, ledger={**gb, "engines": {"main": 69.6}}, memory={"total_gb": 121.7, "available_gb": 40.0})
    s["slots"][0].update(state="serving", model="tiny-chat", served_id="tiny-chat", since=s["now"], facts={"running": 3, "waiting": 0, "tokens_per_s": 61.4, "kv_use": 0.22})
    service = {"kind": "asr", "host": "spark2", "port": 8001, "url": "", "container": "asr", "detail": "", "facts": {}, "since": s["now"], "seen_at": s["now"], "failures": 0}
    s["services"] = [{**service, "name": name, "label": name, "state": state} for name, state in (("parakeet", "serving"), ("qdrant", "down"), ("nim", "loading"))]
    s["schedules"] = [{"id": "nightly", "model": "wide-chat", "owner": "eval-runner", "next_run": s["now"], "duration_minutes": 90, "late": True, "conflicts": []}]
    s["conflicts"] = [{"at": s["now"], "ids": ["nightly", "job morning"], "models": ["wide-chat", "tiny-chat"], "text": ""}]
    s["jobs"] = [{"id": "morning", "kind": "swap", "cron": "55 5 * * *", "model": "tiny-chat", "enabled": True, "missed": "skip", "note": "", "running": False, "runs": [], "next_run": s["now"]}]
    return {**s, "version": "canned", **more}


def test_a_swap_takes_two_clicks_and_tells_what_went_wrong_and_what_to_do(browser, start):
    p = start(args=("--demo",))
    page = open_page(browser, p)
    sees(page, "Swap lock is free.")
    assert set(page.evaluate("performance.getEntriesByType('resource').map(r => new URL(r.name).pathname)")) == {"/api/state"}
    page.get_by_role("button", name="Swap to Tiny Chat 7B").click()
    sees(page, "Swap main to Tiny Chat 7B?")
    page.locator("#checks").get_by_text("reachable").wait_for()             # the checks ran, and the exact commands are there
    page.get_by_text("Exact commands").click()
    assert "demo-engine" in page.locator("#plan pre").inner_text()
    page.get_by_role("button", name="Swap now").click()
    page.locator(".swap .log li").get_by_text("checkpoint shards").first.wait_for()
    sees(page, re.compile(r"^Loading weights, \d+ of 12 files"))
    page.wait_for_function("() => /^● /.test(document.title)")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Swap to Tiny Chat 7B"        # where the question came from
    row(page, "Tiny Chat 7B").get_by_text("Serving on main").wait_for()
    assert page.title() == "Tiny Chat 7B · sparkctl" and page.locator("#slots .model-name").inner_text() == "Tiny Chat 7B"
    page.get_by_role("button", name="Swap to Bad Luck").click()
    page.get_by_role("button", name="Swap now").click()
    sees(page, re.compile(r"^Swap to Bad Luck failed after .* Tiny Chat 7B was restored; main was down for"))
    told = page.locator(".outcome").inner_text()
    assert "Why" in told and "Do" in told and "KV cache" in told and page.title() == "✕ Swap failed · sparkctl"
    page.get_by_role("button", name="Edit knobs").click()
    row(page, "Bad Luck").get_by_label("max-model-len").wait_for()
    page.get_by_role("button", name="Dismiss").click()
    page.locator("#prompt").fill("hello there")                             # the playground asks what serves
    page.locator("#prompt").press("Enter")
    page.locator("#chat").get_by_text("You said: hello there").wait_for()
    page.locator("#requests tr").first.wait_for()
    no_errors(page)


def test_a_swap_is_cancelled_and_a_lock_is_taken_extended_forced_and_given_back(browser, start):
    p = start(args=("--demo",))
    page = open_page(browser, p)
    page.get_by_role("button", name="Swap to Wide Chat 120B").click()
    page.get_by_role("button", name="Swap now").click()
    page.get_by_role("button", name="Cancel swap").click()
    sees(page, re.compile("^Swap to Wide Chat 120B was cancelled"))
    p.idle()
    page.get_by_role("button", name="Take it").click()
    page.get_by_label("Who").fill("ada")
    page.locator("#ask-go").click()
    sees(page, re.compile("holds the swap lock in this tab until"))
    until_ = p.get("/api/swap/lock").json["expires_at"]
    page.get_by_role("button", name="Extend").click()
    until(lambda: p.get("/api/swap/lock").json["expires_at"] > until_)
    page.get_by_role("button", name="Release").click()
    sees(page, "Swap lock is free.")
    assert p.post("/api/swap/lock", {"holder": "daily-vol", "ttl": 900}).status == 201
    sees(page, re.compile("holds the swap lock until"))
    for _ in range(2):                                                      # into the queue, out of it, and in again
        page.get_by_role("button", name="Wait for it").click()
        page.get_by_label("Who").fill("eve")
        page.locator("#ask-go").click()
        until(lambda: p.get("/api/swap/lock").json["queue"] == 1)
        page.get_by_role("button", name="Stop waiting").click()
        until(lambda: p.get("/api/swap/lock").json["queue"] == 0)
    page.get_by_role("button", name="Swap to Tiny Chat 7B").click()
    page.locator("#ask").get_by_text("daily-vol holds the lock until").wait_for()
    page.get_by_role("button", name="Force: swap now").click()
    row(page, "Tiny Chat 7B").get_by_text("Serving on main").wait_for()
    assert p.idle()[0]["forced"]
    page.get_by_role("button", name="Wait for it").click()
    page.locator("#ask-go").click()
    until(lambda: p.get("/api/swap/lock").json["queue"] == 1)
    page.get_by_role("button", name="Override…").click()
    page.get_by_role("button", name="End the lock").click()
    sees(page, re.compile("^holds the swap lock in this tab until"))        # whoever waits is next
    page.get_by_role("button", name="Release").click()
    sees(page, "Swap lock is free.")
    page.get_by_role("button", name="Swap to House Style").click()
    page.locator("#checks").get_by_text("reachable").wait_for()
    page.route("**/api/state*", lambda route: None)                         # the lock is taken after the question was asked
    assert p.post("/api/swap/lock", {"holder": "night-run", "ttl": 900}).status == 201
    page.get_by_role("button", name="Swap now").click()
    page.locator("#ask [role=alert]").get_by_text("night-run").wait_for()
    page.get_by_role("button", name="Force: swap now").click()
    until(lambda: p.running() or p.get("/api/state").json["slots"][0]["model"] == "house-style")
    no_errors(page)


def test_weights_come_with_progress_and_are_cancelled_and_a_services_log_goes_on(browser, zoo):
    zoo.rig.publish("org/new", shards=4, size=2_000_000)
    zoo.rig.sh("spark2", "docker run -d --name asr busybox sh -c 'echo one; while sleep 0.2; do echo more; done'")
    zoo.post("/api/models", {"key": "new", "repo": "org/new"})
    page = open_page(browser, zoo)
    new = row(page, "org/new")
    new.get_by_text("Not on disk").wait_for()
    zoo.rig.control("spark1", "hf_pause", 60)
    new.get_by_role("button", name="Download").click()
    new.get_by_text(re.compile("^Downloading, ")).wait_for()
    new.get_by_role("button", name="Cancel").click()
    until(lambda: zoo.get("/api/disk").json["transfers"][0]["state"] == "cancelled")
    zoo.rig.clear("spark1", "hf_pause")
    new.get_by_role("button", name="Download").click()
    new.get_by_text("On spark1", exact=True).wait_for()         # and not "Incomplete on spark1", as before
    page.get_by_role("button", name="Details of new").click()
    page.get_by_role("button", name="Delete from disk").click()
    sees(page, "Delete new from disk?")
    page.locator("#ask").get_by_role("button", name="Delete from disk").click()
    until(lambda: "weights_deleted" in kinds(zoo), 60, what="the deletion")
    new.get_by_text("Not on disk").wait_for(timeout=60000)
    page.locator(".tile", has_text="gone").click()
    page.get_by_role("button", name="Show log").click()
    page.locator("#service-lines li", has_text="one").wait_for()
    page.wait_for_function("() => document.querySelectorAll('#service-lines li').length > 5")   # and on it goes
    page.locator("#service-lines").get_by_label("Search log").fill("one")
    page.wait_for_function("() => document.querySelectorAll('#service-lines li').length === 1")
    with page.expect_download() as got:
        page.locator("#service-lines [data-do=log-save]").click()
    assert Path(got.value.path()).read_text().startswith("one\nmore\n") and got.value.suggested_filename == "service-gone.log"
    page.locator("#service [data-do=service-restart]").click()
    sees(page, "Restart gone?")
    page.locator("#ask-go").click()
    until(lambda: any(e["kind"] == "service_restarted" or "restart" in e["text"] for e in zoo.get("/api/events").json["events"]))
    no_errors(page)


def test_a_laptop_that_slept_catches_up_at_once(browser, start):
    p = start(args=("--demo",))
    page = open_page(browser, p, canned(p))
    sees(page, "Swap lock is free.")
    with page.expect_request("**/api/state"):                               # without `since`: what was parked is given up
        page.evaluate("() => { state.page.heard -= 60000; ticked -= 60000; tick(); }")
    page.locator("#live", has_text="Live").wait_for()
    no_errors(page)


def test_knobs_are_edited_with_the_command_line_live_and_models_jobs_and_settings_added(browser, start):
    p = start(args=("--demo",))
    page = open_page(browser, p, color_scheme="dark")
    page.get_by_role("button", name="Details of Tiny Chat 7B").click()
    field = row(page, "Tiny Chat 7B").get_by_label("max-model-len")
    field.fill("4096")
    row(page, "Tiny Chat 7B").locator(".cmd [data-changed]", has_text="--max-model-len 4096").wait_for()
    p.post("/api/schedule", {"id": "nightly", "cron": "0 2 * * *", "model": "wide-chat", "duration_minutes": 60})
    page.locator("#lanes").get_by_text("nightly").wait_for()                # an update leaves what is being typed alone
    assert field.input_value() == "4096" and field.evaluate("n => n === document.activeElement")
    field.press("Enter")
    sees(page, re.compile("^Saved. They count"))
    assert p.get("/api/models/tiny-chat").json["knobs"]["max-model-len"] == 4096
    page.get_by_role("button", name="Add model").click()
    page.get_by_label("Hugging Face repo").fill("org/Tiny-Tune")
    page.locator("#ask-go").click()
    row(page, "org/Tiny-Tune").get_by_text("Added here").wait_for()
    assert p.get("/api/models/tiny-tune").json["repo"] == "org/Tiny-Tune"
    page.get_by_role("button", name="Remove from catalog").click()
    page.locator("#ask-go").click()
    row(page, "org/Tiny-Tune").wait_for(state="detached")
    page.get_by_role("button", name="Add job").click()
    for name, value in (("Name", "morning"), ("When", "55 5 * * *")):
        page.get_by_label(name).fill(value)
    page.locator("#ask-fields [name=model]").select_option("tiny-chat")
    page.locator("#ask-go").click()
    page.get_by_role("button", name="Edit job morning").click()
    page.locator("#ask-fields [name=state]").select_option("remove this job")
    page.locator("#ask-go").click()
    until(lambda: p.get("/api/jobs").json["jobs"] == [])
    page.get_by_role("button", name="Settings").click()
    groups = page.locator("#groups [data-group]")
    groups.first.wait_for()
    assert groups.evaluate_all("list => list.map(n => n.dataset.group)") == ["Sparks", "Swaps", "Requests", "Webhooks", "Others"]
    assert groups.nth(2).locator("[name]").get_attribute("name") == "HOLD_SECONDS" and "`" not in page.locator("#groups").inner_text()
    page.get_by_label("HOLD_SECONDS").fill("45")
    assert page.get_by_label("SPARK1_HOST").get_attribute("readonly") is not None
    page.get_by_role("button", name="Test connection").first.click()
    page.locator("#settings").get_by_text(re.compile("^Reached in")).first.wait_for()
    page.locator("#settings-save").click()
    sees(page, re.compile(r"^Saved\."))
    assert next(s["value"] for s in p.get("/api/settings").json["settings"] if s["name"] == "HOLD_SECONDS") == 45
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("wide")
    page.wait_for_function("() => document.querySelectorAll('#list > li').length === 1")
    page.keyboard.press("Escape")
    page.wait_for_function("() => document.querySelectorAll('#list > li').length === 5")
    no_errors(page)


def test_the_page_says_that_sparkctl_is_gone_and_goes_on_when_it_is_back(browser, start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = str(s.getsockname()[1])
    p = start({"SPARKCTL_API_KEY": "sesame"}, args=("--port", port))
    page = open_page(browser, p)
    page.locator("#ask [name=key]").fill("wrong")
    page.get_by_role("button", name="Continue").click()
    sees(page, "The key given was not accepted.")
    page.locator("#ask [name=key]").fill("sesame")
    page.get_by_role("button", name="Continue").click()
    sees(page, "Connect your first Spark")                                  # nothing is configured: the guided path
    page.evaluate("window.stays = true")
    page.locator("#find").fill("a search that stays")
    p.kill()
    sees(page, re.compile("^Connection lost"))
    assert page.locator("#live").inner_text().startswith("Stale since")
    p.start()
    page.locator("#live", has_text="Live").wait_for()
    assert page.evaluate("window.stays") and page.locator("#find").input_value() == "a search that stays"
    page.reload()
    sees(page, "Connect your first Spark")                                  # the key is kept for the tab
    no_errors(page)


def test_hostile_names_are_text_and_nothing_scrolls_sideways_on_a_phone(browser, start):
    p, evil = start(args=("--demo",)), "<img src=x onerror=alert(1)>\u202egpj.exe</script><script>alert(2)</script>" + "x" * 10000
    s = canned(p)
    for place, names in ((s["models"][0], ("name", "repo", "description")), (s["services"][0], ("name", "label", "detail")), (s["schedules"][0], ("id", "owner", "note")),
                         (s["slots"][0], ("detail", "served_id")), (s["events"][0], ("text",)), (s["sparks"][0], ("detail", "host"))):
        place.update(dict.fromkeys(names, evil))
    s.update(lock={"locked": True, "holder": evil, "note": evil, "expires_at": s["now"], "fence": 1, "queue": 2}, warnings=[evil])
    for scheme in ("light", "dark"):
        page = open_page(browser, p, s, color_scheme=scheme, viewport={"width": 360, "height": 780})
        page.locator("#list").get_by_text("[U+202E]gpj.exe").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert "\u202e" not in page.locator("body").inner_text()
        assert page.evaluate("document.querySelectorAll('img, main script, iframe').length") == 0
        page.locator("#list .open").nth(1).click()
        page.locator(".detail").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        page.locator(".tile").first.click()
        page.locator("#drawer-h", has_text="[U+202E]").wait_for()
        no_errors(page)


def test_a_spark_that_froze_in_a_swap_is_told_with_its_last_figures_and_a_name_opens_its_entry(browser, start):
    p = start(args=("--demo",))
    s = canned(p)
    look = lambda at, gb: {"at": at, "available_gb": gb, "pressure": 80.0, "power_w": 30.0}
    swap = {**dict.fromkeys(("ended_at", "started_at"), s["now"]), "id": "x", "slot": "main", "model": "tiny-chat", "phase": "failed", "phases": [], "rollback_of": None,
            "error": {"code": "unreachable", "message": "it is silent", "remedy": "look at it", "log_tail": []},
            "blackbox": {"spark2": {"lost_at": s["now"], "samples": [look("2026-01-01T10:00:00Z", 30.0), look("2026-01-01T10:00:45Z", 0.8)]}}}
    s["services"] = [{**s["services"][0], "name": "qdrant", "state": "serving", "facts": {"collections": ["notes"], "voices": ["a", "b"]}}]
    swap["error"]["log_tail"] = [f"line {n}" for n in range(99)]
    told = (("j", "job j (health): 3 answered"), ("k", "job k (warm): alpha answered"), ("j", "job j (health): 3 answered"))
    s["events"] = [{"n": 9 - n, "kind": "job_ok", "at": f"{s['now'][:10]}T10:0{2 - n}:00Z", "job": job, "text": text} for n, (job, text) in enumerate(told)]
    s["sparks"][0]["ledger"] = None             # as while a swap runs
    page = open_page(browser, p, canned={**s, "last": swap}, timezone_id="UTC")
    sees(page, "Last heard of at 10:00:45: 0.8 GB free, 30.0 at 10:00:00")
    assert page.locator("#events li").all_inner_texts() == ["10:02\njob j (health): 3 answered, 2 times since 10:00", "10:01\njob k (warm): alpha answered"]
    past = p.get("/api/history").json
    past["slots"]["main"] = {"at": [s["now"]] * 3, "tokens_per_s": [None, 8.0, 9.4]}
    page.route("**/api/history*", lambda route: route.fulfill(json=past))
    page.evaluate("more('history')")
    sees(page, "Tokens/s, last hour, peak 9")
    assert "spark2" in page.locator(".outcome dl").inner_text() and page.locator("#tiles").get_by_text("2 voices, 1 collection", exact=True).count() == 1
    assert page.locator(".outcome .log ol").evaluate("n => n.scrollHeight - n.scrollTop - n.clientHeight") < 2     # at its last line
    assert page.locator(".spark .ledger").first.inner_text().split() == ["Engine", "–", "Services", "–", "Cache", "–", "Other", "81.7", "Free", "40.0"]
    row(page, "Tiny Chat 7B").locator("h3").first.click()
    sees(page, "What vLLM will be given")
    no_errors(page)


def test_an_update_touches_only_what_changed_however_long_catalog_and_log_are(browser, start):
    p = start(args=("--demo",))
    s = canned(p, services=[])
    s["models"] = [{**s["models"][0], "key": f"m{i}", "name": f"Model {i}", "serving_on": None} for i in range(500)]
    page = open_page(browser, p, s)
    page.wait_for_function("() => document.querySelectorAll('#list > li').length === 500")
    page.evaluate("""() => {
        render();
        window.seen = [];
        new MutationObserver(rows => seen.push(...rows)).observe(document.documentElement, {subtree: true, childList: true, attributes: true, characterData: true});
        render();
    }""")
    assert page.evaluate("new Promise(done => setTimeout(() => done(seen.length), 0))") == 0
    page.evaluate("""() => {
        const swap = {id: "s", slot: "main", model: "m1", phase: "loading", phases: [], progress: {fraction: 0.5, text: ""}, started_at: state.page.now};
        reading = {id: "s", abort: new AbortController()};
        state = {...state, swap, page: {...state.page, log: {id: "s", lines: Array.from({length: 10000}, (_, n) => ({n, text: `line ${n}`}))}}};
        render();
    }""")
    shown = page.locator(".swap .log li")
    assert shown.count() <= 400 and shown.last.inner_text() == "line 9999"
    page.locator(".swap .log input").fill("line 42")
    page.wait_for_function("() => document.querySelector('.swap .log li').textContent === 'line 42'")
    assert shown.count() == 111                                             # 42, 420 to 429, 4200 to 4299
    page.locator(".swap .log input").fill("")
    page.wait_for_function("() => document.querySelector('.swap .log li:last-child').textContent === 'line 9999'")
    for so_far in (400, 800):                                               # the top of what is shown brings more, and stays where it is
        assert shown.count() == so_far
        page.evaluate("document.querySelector('.swap .log ol').scrollTop = 0")
        page.wait_for_function(f"() => document.querySelectorAll('.swap .log li').length === {so_far + 400}")
        assert page.evaluate("document.querySelector('.swap .log ol').scrollTop") > 1000
    page.get_by_role("button", name="Follow").click()
    page.wait_for_function("() => document.querySelectorAll('.swap .log li').length === 400")
    no_errors(page)


def test_axe_finds_nothing_serious_in_any_view_light_or_dark(browser, start):
    axe = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")       # a package that ships axe-core
    p = start(args=("--demo",))
    s = canned(p, lock={"locked": True, "holder": "daily-vol", "note": "", "expires_at": "2999-01-01T00:00:00Z", "fence": 1, "queue": 2}, warnings=["a warning"])
    swap = {"id": "s", "slot": "main", "model": "wide-chat", "from_model": "tiny-chat", "started_at": s["now"], "holder": "ada", "eta_seconds": 60,
            "usual_seconds": 9, "slower": True, "progress": {"fraction": 0.4, "text": "Loading weights, 4 of 12 files"}}
    phases = [{"phase": "checking", "started_at": s["now"], "seconds": 1}, {"phase": "loading", "started_at": s["now"], "seconds": None}]
    error = {"code": "out_of_memory", "message": "CUDA out of memory.", "remedy": "Lower it.", "log_tail": ["WARNING a line", "RuntimeError: another"]}
    views = {"details": "#list .open", "service": ".tile", "settings": "header [data-do=settings]", "swap": "#list > li:nth-child(2) .act button", "job": "[data-do=job]",
             "add": "[data-do=add]", "queue": "[data-do=lock]"}
    states = {"swapping": {"swap": {**swap, "phase": "loading", "phases": phases}},
              "failed": {"last": {**swap, "phase": "failed", "phases": phases, "ended_at": s["now"], "error": error}}}
    for scheme in ("light", "dark"):
        page = open_page(browser, p, s, color_scheme=scheme, reduced_motion="reduce")
        page.evaluate(axe.read_text())

        def finds_nothing(view, where):
            found = page.evaluate("where => axe.run(where || document, {resultTypes: ['violations']})", where)["violations"]
            assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found if v["impact"] in ("serious", "critical")] == [], (scheme, view)
        for view, opener in views.items():
            page.locator(opener).first.click()
            page.locator(".detail" if view == "details" else "dialog[open]").wait_for()
            finds_nothing(view, None if view == "details" else "dialog[open]")
            page.keyboard.press("Escape")
        for view, more in states.items():
            page.evaluate("more => { state = {...state, swap: null, last: null, ...more}; render(); }", more)
            page.locator(".slot .steps:visible").wait_for()
            finds_nothing(view, ".slot")
        page.evaluate("page({link: 'lost', lost: Date.now()})")
        page.get_by_text("Stale since").wait_for()
        finds_nothing("offline", None)
        page.evaluate("() => { state = {...state, sparks: [], slots: [], services: []}; page({link: 'live'}); }")
        sees(page, "Connect your first Spark")
        finds_nothing("first run", "main")
        no_errors(page)


def test_the_page_is_small_and_writes_text_as_text():
    page = (HERE / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 100 << 10
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|<[a-z][^<>]*\s(on\w+|style)=|https?://(?!www\.w3\.org/2000/svg|huggingface)[a-z]", page)
    assert page.count("<script>") == page.count("<style>") == 1


# === README ===================================================================

README = (HERE / "README.md").read_text()


def test_the_readme_names_every_kind_of_event():
    assert sorted(re.findall(r"`(\w+)`", re.search(r"Kinds of events\.(.*?)\n\n", README, re.S)[1])) == sorted(sc.EVENTS)


def test_the_readmes_table_of_checks_is_the_codes():
    section = re.search(r"\| check \| looks at \|\n(.*?)\n\n", README, re.S)[1]
    assert sorted(re.findall(r"`(\w+)`", "".join(row.split("|")[1] for row in section.splitlines()))) == sorted(sc.CHECKS)


def test_the_readmes_table_of_settings_is_the_codes():
    rows = [f"| `{s.name}` | {f'`{s.default}`' if s.default else ''} | {s.help}{' (secret)' if s.secret else ''} |"
            for s in sc.SETTINGS if not re.match(r"SPARK[2-8]_", s.name)]
    assert "\n".join(["| setting | default | meaning |", "| --- | --- | --- |", *rows]) + "\n" in README


def transitions():
    return [f"{phase} -> {', '.join(sorted(nexts, key=sc.PHASES.index)) or '(end)'}" for phase, nexts in sc.TRANSITIONS.items()]


def test_the_readmes_transitions_are_the_codes_and_its_routes_exist():
    assert "\n".join(transitions()) in README
    told = set(re.findall(r"`(GET|POST|DELETE|PUT) (/[^`?\s]*)", README[README.index("| route |"):README.index("## A swap")]))
    real = {(r.method, r.path) for r in sc.ROUTES} | {("POST", p) for p in sc.PROXIED}
    assert told == real


def codes_of(source):
    """The error codes that the program can answer, from the calls that make them."""
    found = set()
    for call in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)):
        name, args = ast.unparse(call.func).rpartition(".")[2], call.args
        if name == "partial":
            name, args = ast.unparse(args[0]).rpartition(".")[2], args[1:]
        at = {"Refused": 1, "held_locked": 1, "on_spark": 1, "write_state": 2, "entry_of": 1, "edit": 0}.get(name, 99)
        code = args[at] if len(args) > at else None
        words = {w for c in (code.body, code.orelse) for w in [getattr(c, "value", None)]} if isinstance(code, ast.IfExp) else {getattr(code, "value", None)}
        words = {w for w in words if isinstance(w, str)}
        found |= {"unknown_" + w for w in words} if name == "entry_of" else {f"{w}_{how}" for w in words for how in ("broken", "unwritable")} if name == "edit" else words
    return found


def test_the_readmes_tables_of_error_codes_have_each_that_the_program_can_answer_and_no_other():
    inner = {"unhealthy", "unreachable", "job_gone",            # what a job or a row of a check is told, in words
             "NotFoundError"}                                   # the demo's engine speaks like vLLM
    elsewhere = {"unknown_schedule", "unknown_job", "name_taken", "check_failed"}       # made of parts; of a swap's error
    tables = re.findall(r"\| code \| status \|.*\n\|[- |]+\n((?:\|.*\n)+)", README)
    told = [code for table in tables for row in table.splitlines() for code in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(tables) == 5 and sorted(set(told)) == sorted(codes_of(SOURCE) - inner | elsewhere)
    assert codes_of('raise Refused(409, "a" if x else "b", "m"); entry_of(x, "c", y); partial(app.on_spark, s, "d", "")') == {"a", "b", "unknown_c", "d"}


def test_the_readme_has_each_code_of_a_swaps_and_of_a_transfers_error():
    failed = {w.value for n in ast.walk(ast.parse(SOURCE)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Failed"
              for w in ast.walk(n.args[0]) if isinstance(w, ast.Constant) and re.fullmatch(r"[a-z]+(_[a-z]+)+|unreachable", str(w.value))}
    table = README[README.index("| when | `code`"):README.index("<!-- transitions")]
    assert sorted(re.findall(r"`(\w+)`", table)[2:]) == sorted(failed | {"internal"} | {row[1] for row in sc.FATAL})
    text = README[README.index("A transfer that failed"):README.index("Deleting takes")]
    told = {row[1] for row in sc.TRANSFER_FAILURES} | {"download_failed", "disk_full", "incomplete", "interrupted"}
    assert told == set(re.findall(r"`(\w+)`", text)) - {"error", "uvx", "hf"}


RECIPES = re.findall(r"```sh\n(.*?)```", README[README.index("## Cron recipes"):README.index("## Webhooks")], re.S)


@pytest.mark.parametrize("recipe", RECIPES, ids=[re.sub(r"\W+", "-", r.replace("#!/bin/bash\nset -euo pipefail\n", ""))[:40] for r in RECIPES])
def test_every_cron_recipe_of_the_readme_does_what_it_says(start, tmp_path, recipe):
    need(shutil.which("curl"), "curl")
    p = start(args=("--demo",))
    script = tmp_path / "recipe.sh"
    script.write_text(recipe.replace("localhost:9999", f"127.0.0.1:{p.port}"))
    if "force=true" in recipe:
        lock(p, "dead cron")
    got = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert got.returncode == 0, got
    state = p.get("/api/state").json
    assert state["lock"] == {"locked": False} and not list(tmp_path.glob("tmp.*"))
    if "/api/swap?wait" in recipe:
        assert state["slots"][0]["model"] == ("house-style" if "house-style" in recipe else "tiny-chat")
    if "-H @" in recipe:
        assert [e["kind"] for e in state["events"]].count("lock_acquired") == 1 and state["events"][0]["kind"] == "lock_released"
        assert ("lock_extended" in [e["kind"] for e in state["events"]]) == ("kill -0" in recipe) and ("the work itself" in got.stdout) == ("v1" in recipe)
    assert [row["id"] for row in state["schedules"]] == (["daily-vol"] if "/api/schedule" in recipe else [])
    assert [row["id"] for row in state["jobs"]] == (["morning"] if "/api/jobs" in recipe else [])
    assert "dead cron" not in recipe or "dead cron" in got.stdout


def test_a_recipe_whose_swap_fails_tells_why_and_leaves_no_lock(start, tmp_path):
    p = start(args=("--demo",))
    recipe = next(r for r in RECIPES if "Idempotency-Key" in r).replace("localhost:9999", f"127.0.0.1:{p.port}").replace('{"model": "tiny-chat", "lock"', '{"model": "too-greedy", "lock"')
    got = subprocess.run(["bash", "-c", recipe], capture_output=True, text=True, timeout=60)
    assert got.returncode == 22 and "too-greedy" in got.stdout and p.get("/api/swap/lock").json == {"locked": False}


def test_the_recipe_that_extends_its_lock_ends_as_its_work_does_and_with_the_lock(start, tmp_path):
    p = start(args=("--demo",))
    recipe = next(r for r in RECIPES if "kill -0" in r).replace("localhost:9999", f"127.0.0.1:{p.port}")
    run = lambda work: subprocess.Popen(["bash", "-c", recipe.replace("sleep 2 &", f"{work} &")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    got = run("(sleep 1; exit 3)")
    assert got.wait(30) == 3 and p.get("/api/swap/lock").json == {"locked": False}
    got = run("sleep 61.7")
    until(lambda: p.get("/api/swap/lock").json["locked"])
    p.call("DELETE", "/api/swap/lock?force=true")
    assert got.wait(30) == 22 and b"lock_lost" in got.stdout.read() and not pids_of("sleep 61.7")


def pids_of(command):
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes() == command.replace(" ", "\0").encode() + b"\0" and alive(pid):
                found.append(pid)
    return found


def test_the_readmes_edits_work_on_the_demo(start):
    need(shutil.which("curl"), "curl")
    p = start(args=("--demo",))
    block = next(b for b in re.findall(r"```sh\n(.*?)```", README, re.S) if "/knobs" in b)
    for line in block.replace("localhost:9999", f"127.0.0.1:{p.port}").splitlines():
        got = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=20)
        assert got.returncode == 0 and '"error"' not in got.stdout, (line, got.stdout)
    assert setting(p.get("/api/settings").json, "HOLD_SECONDS")["value"] == 120 and p.get("/api/models/mine").status == 200
    assert p.get("/api/models/tiny-chat").json["overridden"] == ["max-model-len"] and p.get("/api/models/wide-chat").json["hidden"]


def test_the_webhook_check_of_the_readme_is_right():
    names = {"hmac": hmac}
    exec(re.search(r"```python\n(.*?)```", README, re.S)[1], names)
    good = "sha256=" + hmac.new(b"s", b"body", hashlib.sha256).hexdigest()
    assert names["genuine"](b"s", b"body", good) and not names["genuine"](b"s", b"bodY", good)


def test_the_readmes_example_files_load_without_a_problem():
    models, services, overrides = (yaml.load(block, sc.LoudLoader) for block in re.findall(r"```yaml\n(.*?)```", README, re.S))
    settings = sc.parse_settings({})
    assert sc.parse_catalog(models, overrides, settings["LOCAL_MODEL_ROOTS"])[1] == []
    assert sc.parse_layout(services, TWO, settings)[1] == []
    shipped = yaml.safe_load((HERE / "models.yaml").read_text())["models"]["gpt-oss-20b"]
    told = models["models"]["gpt-oss-20b"]
    assert told["knobs"].items() <= shipped["knobs"].items() and all(told[k] == shipped[k] for k in told if k != "knobs")
    options = "".join(line[2:] for line in (HERE / "services-overrides.yaml").read_text().splitlines(True) if line.startswith("#:"))
    options = yaml.load(options, sc.LoudLoader)
    assert sc.parse_layout(options, TWO, settings)[1] == [] and services == {k: options[k] for k in ("slots", "backends")}


# === the file itself ==========================================================

def forward_refs(source):
    """Top-level names used inside a block that stands above their definition."""
    tree, defined, out = ast.parse(source), {}, set()
    for node in tree.body:
        found = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else \
            [n.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if t for n in ast.walk(t) if isinstance(n, ast.Name)] \
            if isinstance(node, (ast.Assign, ast.AnnAssign)) else []
        for name in found:
            defined.setdefault(name, node.lineno)
    for node in tree.body:
        owner = getattr(node, "name", None)
        local = {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
        local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)} if owner else set()
        out |= {(owner, n.id) for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)
                and defined.get(n.id, 0) > node.lineno and n.id != owner and n.id not in local}
    return out


def unguarded(source):
    """Accesses to fields marked `# guarded by X` outside `with self.X` and outside methods named *_locked.

    Of a field marked `# replaced under X` only the assignments count: readers take the object that is there.
    """
    lines, bad, classes = source.splitlines(), [], {}
    for cls in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)):
        aliases = {"_wake": "_lock", "_changing": "_lock"}      # a Condition made on a lock holds that lock; _changing() takes it
        guards = dict(p for base in cls.bases if isinstance(base, ast.Name) for p in classes.get(base.id, {}).items())
        for n in ast.walk(cls):
            if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store) and (m := re.search(r"# (guarded by|replaced under) (\w+)", lines[n.lineno - 1])):
                guards.setdefault(n.attr, (m[2], m[1] == "guarded by"))
        classes[cls.name] = guards

        def visit(node, held):
            if isinstance(node, ast.With):
                taken = [i.context_expr.func if isinstance(i.context_expr, ast.Call) else i.context_expr for i in node.items]
                held = held | {aliases.get(a.attr, a.attr) for a in taken if isinstance(a, ast.Attribute)}
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in guards \
                    and guards[node.attr][0] not in held and (guards[node.attr][1] or isinstance(node.ctx, ast.Store)):
                bad.append(f"{cls.name}.{node.attr} line {node.lineno}")
            for child in ast.iter_child_nodes(node):
                visit(child, held)
        for f in cls.body:
            if isinstance(f, ast.FunctionDef) and f.name != "__init__" and not f.name.endswith("_locked"):
                visit(f, frozenset())
    return bad


def test_every_name_is_defined_above_its_first_use():
    assert forward_refs(SOURCE) == set()


def test_the_layering_check_itself_notices_a_use_above_its_definition():
    assert forward_refs("def a():\n    return b()\ndef b():\n    pass\n") == {("a", "b")}


def test_guarded_fields_are_touched_only_under_their_lock():
    assert unguarded(SOURCE) == []


def test_the_guard_check_itself_catches_a_bare_read():
    for old, new in (("        with self._lock:\n            return [dict(row) for row in self._deliveries]", "        return [dict(row) for row in self._deliveries]"),
                     ("    def lock_info(self):\n", "    def lock_info(self):\n        self.book = None\n")):
        assert SOURCE.count(old) == 1 and len(unguarded(SOURCE.replace(old, new))) == 1


def test_only_the_standard_library_and_yaml_are_imported():
    tree = ast.parse(SOURCE)
    modules = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules - set(sys.stdlib_module_names) == {"yaml"}


def test_one_function_starts_processes_and_the_file_stays_below_its_limit():
    assert SOURCE.count("subprocess.Popen(") == 1
    assert not re.search(r"subprocess\.(run|call|check_output)|os\.system|shell=True|os\.popen", SOURCE)
    assert len(SOURCE.splitlines()) < 7650


def test_importing_has_no_side_effect(tmp_path):
    got = subprocess.run([sys.executable, "-c", "import threading, sparkctl; print(threading.active_count())"], cwd=HERE,
                         env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=20)
    assert (got.stdout, got.stderr) == ("1\n", "")


# === 1 settings ===============================================================

@pytest.mark.parametrize("name,value,told", [
    ("VLLM_PORT", "eighty", "VLLM_PORT: 'eighty' from the environment must be a whole number from 1 to 65535"),
    ("VLLM_PORT", "70000", "VLLM_PORT: '70000' from the environment must be a whole number from 1 to 65535"),
    ("POLL_SECONDS", "nan", "POLL_SECONDS: 'nan' from the environment must be a number from 1 to 3600"),
    ("SWAP_ROLLBACK", "perhaps", "SWAP_ROLLBACK: 'perhaps' from the environment must be on or off"),
    ("SPARK1_HOST", "-oProxyCommand=id", "SPARK1_HOST: '-oProxyCommand=id' from the environment must be a host name"),
    ("SPARK1_USER", "a b", "SPARK1_USER: 'a b' from the environment must be a login name"),
    ("VLLM_CONTAINER", "x;id", "VLLM_CONTAINER: 'x;id' from the environment must be a container name"),
    ("LOCAL_MODEL_ROOTS", "/a/../b", "LOCAL_MODEL_ROOTS: '/a/../b' from the environment '/a/../b' is not"),
])
def test_a_bad_setting_falls_back_and_the_warning_names_variable_and_value(name, value, told):
    got = sc.parse_settings({name: value})
    assert got[name] == sc.SETTING[name].parse(sc.SETTING[name].default)
    assert got.sources[name] == "default" and len(got.warnings) == 1
    assert got.warnings[0].startswith(told.split(" '/a/../b' is not")[0])


def test_environment_beats_file_beats_default_and_blank_means_the_next():
    got = sc.parse_settings({"VLLM_PORT": "1234", "VLLM_CONTAINER": "  "}, {"VLLM_PORT": 99, "VLLM_CONTAINER": "mine", "SWAP_ROLLBACK": False, "DISABLED_SERVICES": ["a", "b"]})
    assert (got["VLLM_PORT"], got["VLLM_CONTAINER"], got["SWAP_ROLLBACK"], got["DISABLED_SERVICES"]) == (1234, "mine", False, ("a", "b"))
    assert (got.sources["VLLM_PORT"], got.sources["VLLM_CONTAINER"], got.sources["LAUNCH_DIR"]) == ("environment", "file", "default")
    assert sc.parse_settings({"VLLM_PORT": "bad"}, {"VLLM_PORT": "99"})["VLLM_PORT"] == 99


def test_a_name_that_is_no_setting_is_reported_with_the_nearest():
    got = sc.parse_settings({"SPARK1_HSOT": "x", "SPARKCTL_PROT": "1", "SPARK_1_HOST": "y", "VLLM_USE_V1": "1", "PATH": "z"}, {"POLL_SECOND": 3})
    assert [w.split(" is not")[0] for w in got.warnings] == ["settings.yaml: POLL_SECOND", "environment: SPARK1_HSOT", "environment: SPARKCTL_PROT", "environment: SPARK_1_HOST"]
    assert "did you mean SPARK1_HOST?" in got.warnings[1]


def test_a_bad_secret_is_reported_without_its_value():
    got = sc.parse_settings({"SPARKCTL_API_KEY": "hush\x07hush"})
    assert got.warnings and "hush" not in " ".join(got.warnings)


def test_secrets_are_masked_wherever_settings_are_shown(start, tmp_path):
    p = start({"SPARKCTL_API_KEY": "tops3cret", "VLLM_API_KEY": "engine-s3cret"}, args=("--demo",))
    auth = {"Authorization": "Bearer tops3cret"}
    shown = p.get("/api/settings", headers=auth).body + p.get("/api/state", headers=auth).body
    assert b"s3cret" not in shown and b'"SPARKCTL_API_KEY"' in shown
    assert p.get("/api/state").status == 401
    assert "s3cret" not in p.said()


def check(tmp_path, env=None, args=()):
    clean = {k: v for k, v in os.environ.items() if k not in sc.SETTING}
    return subprocess.run([sys.executable, str(HERE / "sparkctl.py"), "check", *args], env={**clean, "SPARKCTL_DATA": str(tmp_path / "d"), **(env or {})},
                          capture_output=True, text=True, timeout=20)


def test_check_prints_what_is_in_force_and_ends_with_0_1_or_2(tmp_path):
    good = check(tmp_path, {"SPARK1_HOST": "spark-a", "SPARK2_HOST": "spark-b", "VLLM_API_KEY": "hush-hush"})
    assert good.returncode == 0 and "No problems" in good.stdout, good.stdout
    for words in ("SPARK1_HOST = spark-a  (environment)", "VLLM_API_KEY = set", "main: spark1, spark2, port 8888", "gpt-oss-120b: openai/gpt-oss-120b (solo)", "launch-cluster:"):
        assert words in good.stdout
    assert "hush" not in good.stdout
    (tmp_path / "bad.yaml").write_text("models: {BAD: {repo: a/b}, ok: {repo: a/c}}")
    bad = check(tmp_path, {"SPARK1_HOST": "x", "POLL_SECONDS": "soon"}, ["--models", str(tmp_path / "bad.yaml")])
    assert bad.returncode == 1 and "POLL_SECONDS: 'soon'" in bad.stdout and "bad.yaml: BAD" in bad.stdout and "ok: a/c" in bad.stdout
    assert check(tmp_path, args=["--models", str(tmp_path / "none.yaml")]).returncode == 2


def test_what_is_shipped_has_no_problem_and_at_least_ten_models_solo_and_cluster():
    settings = sc.parse_settings({"SPARK1_HOST": "a", "SPARK2_HOST": "b"})
    store = sc.ConfigStore(settings, {"models": str(HERE / "models.yaml"), "overrides": "/nonexistent", "services": str(HERE / "services-overrides.yaml")})
    assert store.current.problems == ()
    modes = [m.mode for m in store.current.models.values()]
    assert len(modes) >= 10 and {"solo", "cluster"} <= set(modes)


def test_every_commented_option_of_the_services_file_loads_without_a_problem():
    options = re.sub(r"^#:", "", (HERE / "services-overrides.yaml").read_text(), flags=re.M)
    settings = sc.parse_settings({"SPARK1_HOST": "a", "SPARK2_HOST": "b"})
    layout, problems = sc.parse_layout(yaml.load(options, sc.LoudLoader), {"spark1": sc.Spark("spark1", "a"), "spark2": sc.Spark("spark2", "b")}, settings)
    assert problems == []
    assert {s.backend for s in layout.slots.values()} == {"launch-cluster", "raw-docker"}
    assert {s.kind for s in layout.services.values()} >= {"vllm", "asr", "tts", "embeddings", "qdrant", "nim", "open-webui", "http"}


# === 2 small helpers ==========================================================

def test_a_state_file_is_replaced_whole_and_keeps_no_temporary_file(tmp_path):
    path = tmp_path / "x.json"
    sc.write_atomic(str(path), b'{"a": 1}')
    sc.write_atomic(str(path), b'{"a": 2}')
    assert json.loads(path.read_text()) == {"a": 2} and os.listdir(tmp_path) == ["x.json"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100000])
def test_a_torn_or_foreign_state_file_is_set_aside_and_reported(tmp_path, content):
    (tmp_path / "swap.json").write_bytes(content)
    told = []
    assert sc.read_state(str(tmp_path / "swap.json"), told.append) == {}
    assert len(told) == 1 and [n for n in os.listdir(tmp_path) if n.startswith("swap.json.bad-")]


def test_a_state_file_that_cannot_be_read_ends_the_start_and_stays_as_it_is(tmp_path, start):
    (tmp_path / "data" / "swap.json").mkdir(parents=True)       # root may read any file
    p = start(wait=False)
    assert p.process.wait(20) == 2
    assert str(tmp_path / "data" / "swap.json") in p.said() and os.listdir(tmp_path / "data" / "swap.json") == []
    with pytest.raises(OSError):
        sc.read_state(str(tmp_path / "data"), print)


def test_text_from_outside_is_printed_without_control_characters():
    assert sc.printable("a\x1b[31mred\x1b[0m\rb\x00\x07\tc") == "ared\ufffdb\ufffd\ufffd c"


# === 3 hosts ==================================================================

@pytest.mark.parametrize("said,kind", [
    ("ssh: connect to host s port 22: Connection refused", "unreachable"),
    ("ssh: connect to host s port 22: No route to host", "unreachable"),
    ("ssh: connect to host s port 22: Connection timed out", "time_out"),
    ("ssh: Could not resolve hostname s: Name or service not known", "unreachable"),
    ("u@s: Permission denied (publickey,password).", "refused_login"),
    ("No ED25519 host key is known for s and you have requested strict checking.\nHost key verification failed.", "unknown_host_key"),
    ("Timeout, server s not responding.", "time_out"),
    ("", "unreachable"),
])
def test_the_failures_of_ssh_are_told_apart(said, kind):
    got = sc.classify_ssh_failure(said)
    assert got[0] == kind and got[2]


def test_the_failures_of_a_pretended_ssh_are_told_apart_too(rig, monkeypatch):
    monkeypatch.setenv("PATH", f"{rig.bin}:{os.environ['PATH']}")
    hosts = sc.Hosts([sc.Spark("spark1", "spark1"), sc.Spark("gone", "no-such-host"), sc.Spark("here", "local")])
    try:
        assert hosts.run("spark1", "echo hi; echo there >&2; exit 3", 10)[:3] == ("failed", 3, "hi\n")
        assert hosts.run("spark1", "echo in", 10).out == "in\n"
        assert hosts.run("gone", "true", 10).kind == "unreachable"
        assert hosts.run("here", "echo local", 10).out == "local\n"
        assert hosts.address("spark1") == "127.0.0.1" and hosts.address("here") == "127.0.0.1"
        for fault, kind in (("denied", "refused_login"), ("hostkey", "unknown_host_key"), ("down", "unreachable")):
            rig.control("spark1", fault)
            assert hosts.run("spark1", "true", 10).kind == kind
            rig.clear("spark1", fault)
        began = time.monotonic()
        rig.control("spark1", "freeze")
        assert hosts.run("spark1", "true", 1).kind == "time_out" and time.monotonic() - began < 8
        rig.clear("spark1", "freeze")
        assert hosts.run("spark1", "true", 10).kind == "ok"
        argv = rig.calls()[0]["argv"]
        assert argv[argv.index("--") + 1] == "spark1" and "BatchMode=yes" in argv
    finally:
        hosts.close()
    assert not os.path.exists(hosts.control_dir)


def test_an_alias_is_resolved_to_the_address_for_http(start, rig, tmp_path):
    p = start(rig_env(rig, tmp_path, SPARK1_HOST="spark2", SPARK2_HOST="spark1"), args=("--models", str(tmp_path / "models.yaml")))
    assert p.get("/api/state").json["slots"][0]["url"] == f"http://127.0.0.2:{rig.port}"


# === 4 catalog ================================================================

ROOTS = ("/models", "/home")


@pytest.mark.parametrize("entry,field,words", [
    ({"repo": "a/b", "local_path": "/models/x"}, "", "exactly one of repo and local_path"),
    ({}, "", "exactly one of repo and local_path"),
    ({"repo": "no-slash"}, "repo", "org/name"),
    ({"repo": "a/b--c"}, "repo", "org/name"),
    ({"repo": "a/../b"}, "repo", "org/name"),
    ({"repo": "a/b.git"}, "repo", "org/name"),
    ({"repo": 5}, "repo", "must be a text"),
    ({"repo": "a/b", "mode": "both"}, "mode", "must be one of solo, cluster"),
    ({"repo": "a/b", "knbs": {}}, "knbs", "did you mean knobs"),
    ({"repo": "a/b", "knobs": {"--x": 1}}, "knobs", "without leading dashes"),
    ({"repo": "a/b", "knobs": {"port": 1}}, "knobs", "port is set by sparkctl"),
    ({"repo": "a/b", "knobs": {"x": float("nan")}}, "knobs", "nan"),
    ({"repo": "a/b", "env": {"A-B": "1"}}, "env", "A-B"),
    ({"repo": "a/b", "aliases": ["sp ace"]}, "aliases", "sp ace"),
    ({"repo": "a/b", "size_gb": "big"}, "size_gb", "must be a number"),
    ({"repo": "a/b", "image": "x; id"}, "image", "container image"),
    ({"repo": "a/b", "size_gb": int("9" * 400)}, "size_gb", "must be a number of GiB"),
    ({"repo": "a/b", "knobs": {"k": 1 << 70}}, "knobs", "too large"),
    ({"repo": "a/b", "args": ["\ud800"]}, "args", "surrogates"),
    ({"local_path": "models/x"}, "local_path", "absolute"),
    ({"local_path": "/models/../etc"}, "local_path", "normalised"),
    ({"local_path": "/models/a:b"}, "local_path", "colons"),
    ({"local_path": "/models/a,b"}, "local_path", "commas"),
    ({"local_path": "/models/a\nb"}, "local_path", "control"),
    ({"local_path": "/etc/x"}, "local_path", "below one of /models, /home"),
    ({"local_path": "/models"}, "local_path", "below one of"),
    ({"local_path": "/modelsX/y"}, "local_path", "below one of"),
    ([], "", "must be a mapping"),
])
def test_a_bad_catalog_entry_is_reported_with_its_field_and_the_others_load(entry, field, words):
    models, problems = sc.parse_catalog({"models": {"bad": entry, "good": {"repo": "x/y"}}}, {}, ROOTS)
    assert list(models) == ["good"]
    [p] = problems
    assert (p.file, p.entry, p.field) == ("models.yaml", "bad", field) and words in p.message


@pytest.mark.parametrize("key", ["Bad", "", "-x", "a" * 65, "a/b", 7, "ü"])
def test_a_bad_key_is_reported(key):
    models, problems = sc.parse_catalog({"models": {key: {"repo": "x/y"}}}, {}, ROOTS)
    assert not models and len(problems) == 1


def test_a_name_claimed_twice_is_reported_for_both_and_given_to_neither():
    models, problems = sc.parse_catalog({"models": {"a": {"repo": "o/one", "aliases": ["x", "b"]}, "b": {"repo": "o/two", "aliases": ["x"]}}}, {}, ROOTS)
    assert models["a"].served_names == ("a", "o/one") and models["b"].served_names == ("b", "o/two")
    assert sorted((p.entry, "x" in p.message) for p in problems if "name x" in p.message) == [("a", True), ("b", True)]


def test_knobs_become_arguments_as_the_contract_says():
    knobs = {"a": 1, "b": 0.7, "c": True, "d": False, "e": None, "f": ["x", 2], "g": {"k": [1, None]}, "h": "6G", "i": -1, "j": ""}
    _, [] = {}, []
    assert sc.knob_args(tuple(knobs.items())) == ["--a", "1", "--b", "0.7", "--c", "--f", "x", "2", "--g", '{"k": [1, null]}', "--h", "6G", "--i=-1", "--j", ""]


def test_overrides_change_knobs_add_and_hide_models():
    base = {"models": {"a": {"repo": "o/a", "knobs": {"x": 1, "y": 2}}, "b": {"repo": "o/b"}}}
    models, problems = sc.parse_catalog(base, {"knobs": {"a": {"x": None, "y": 3, "z": False}}, "models": {"c": {"repo": "o/c"}}, "hidden": ["b"]}, ROOTS)
    assert problems == [] and [k for k in sorted(models) if not models[k].hidden] == ["a", "c"] and models["b"].hidden
    assert dict(models["a"].knobs) == {"y": 3, "z": False} and models["c"].added


def test_files_are_read_again_when_they_change_and_a_broken_one_keeps_what_was_good(start, tmp_path):
    catalog, services = tmp_path / "m.yaml", tmp_path / "s.yaml"
    catalog.write_text("models: {one: {repo: a/one}}")
    services.write_text("")
    p = start({"SPARK1_HOST": "local"}, args=("--models", str(catalog), "--services", str(services)))
    keys = lambda: [m["key"] for m in p.get("/api/models").json["models"]]
    assert keys() == ["one"]
    catalog.write_text("models: {one: {repo: a/one}, two: {repo: a/two}}")
    until(lambda: keys() == ["one", "two"])
    catalog.write_text("models: {one: {repo: [")
    warning = until(lambda: [w for w in p.get("/api/state").json["warnings"] if "m.yaml" in w])
    assert keys() == ["one", "two"] and "line 1" in warning[0] and "stays in force" in warning[0]
    os.unlink(catalog)
    until(lambda: [w for w in p.get("/api/state").json["warnings"] if "No such file" in w])
    assert keys() == ["one", "two"]
    services.write_text("slots: {other: {port: 9000}}")
    until(lambda: [s["name"] for s in p.get("/api/state").json["slots"]] == ["other"])


def test_a_key_given_twice_in_yaml_is_refused(tmp_path):
    (tmp_path / "m.yaml").write_text("models:\n  a: {repo: x/y}\n  a: {repo: x/z}\n")
    with pytest.raises(ValueError, match="line 3: the key 'a' is given twice"):
        sc.read_yaml(str(tmp_path / "m.yaml"))


def overrides_of(program):
    path = program.data / "models-overrides.yaml"
    return yaml.safe_load(path.read_text()) if path.exists() else None


def test_knobs_are_changed_left_out_and_given_back_and_the_command_line_follows(two):
    got = two.call("PUT", "/api/models/alpha/knobs", {"max_model_len": 8192, "speculative-config": {"method": "mtp"}, "gpu-memory-utilization": False})
    assert got.status == 200, got.body
    assert got.json["knobs"] == {"max-model-len": 8192, "gpu-memory-utilization": False, "speculative-config": {"method": "mtp"}}
    assert "--max-model-len 4096 --gpu-memory-utilization 0.5" in got.json["before"] and "launch-cluster.sh" in got.json["before"]
    assert "--max-model-len 8192 --speculative-config '{\"method\": \"mtp\"}'" in got.json["after"] and "utilization" not in got.json["after"]
    assert got.json["overridden"] == ["max-model-len", "speculative-config", "gpu-memory-utilization"] and got.json["takes_effect"].startswith("at once")
    event = two.get("/api/events").json["events"][0]
    assert (event["kind"], event["client"], event["model"]) == ("catalog_changed", "127.0.0.1", "alpha") and "max_model_len" in event["text"]
    assert two.get("/api/models/alpha").json == {k: v for k, v in got.json.items() if k not in ("before", "after", "takes_effect")}
    two.restart()
    assert two.get("/api/models").json["models"][0]["overridden"] == got.json["overridden"]
    back = two.call("PUT", "/api/models/alpha/knobs", {"max-model-len": None, "gpu_memory_utilization": None, "speculative-config": None}).json
    assert (back["knobs"], back["overridden"], overrides_of(two)) == ({"max-model-len": 4096, "gpu-memory-utilization": 0.5}, [], sc.OVERRIDES)
    for n in (4, 5):
        assert two.swap("alpha", restart=True).status == 200
        assert two.call("PUT", "/api/models/alpha/knobs", {"max-num-seqs": n}).json["takes_effect"].startswith("at the next load")
    [(pid, argv)] = two.rig.engines("spark1")
    assert argv[-2:] == ["--max-num-seqs", "4"]


def test_a_long_poll_learns_of_an_edit_at_once(bare):
    version = bare.get("/api/state").json["version"]
    reader = background(bare.get, f"/api/state?since={version}&wait=50")
    assert bare.post("/api/models", {"key": "x", "repo": "a/b"}).status == 201
    assert [m["key"] for m in reader.result(20).json["models"]] == ["x"]


def test_a_null_in_the_overrides_file_removes_the_flag_and_a_put_null_removes_that(two):
    path = two.data / "models-overrides.yaml"
    path.write_text("knobs: {alpha: {max-model-len: null}}")
    until(lambda: "max-model-len" not in two.get("/api/models/alpha").json["knobs"])
    assert two.get("/api/models/alpha").json["overridden"] == ["max-model-len"]
    assert two.call("PUT", "/api/models/alpha/knobs", {"max_model_len": None}).json["knobs"]["max-model-len"] == 4096


def test_fifty_edits_at_once_lose_none(two):
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        got = list(pool.map(lambda n: two.call("PUT", f"/api/models/{'alpha' if n % 2 else 'beta'}/knobs", {f"knob-{n}": n}), range(50)))
    assert {g.status for g in got} == {200}
    assert {k for entry in overrides_of(two)["knobs"].values() for k in entry} == {f"knob-{n}" for n in range(50)}


@pytest.mark.parametrize("knobs,words", [
    ({"--x": 1}, "without leading dashes"), ({"port": 1}, "port is set by sparkctl"), ({"served_model_name": "x"}, "is set by sparkctl"),
    ({"x": 1 << 70}, "too large"), ({"x": "a\0b"}, "NUL"), ({"x": ["\ud800"]}, "surrogates"), ({"a\nb": 1}, "not a flag name"),
    ({"$(id)": 1}, "not a flag name"), ({"x" * 10000: 1}, "not a flag name"), ({"x": functools.reduce(lambda v, _: [v], range(400), 1)}, "recursion"),
    ({"x": "y" * (1 << 20)}, "too much, or")])
def test_a_hostile_knob_is_refused_and_nothing_is_written(two, knobs, words):
    got = two.call("PUT", "/api/models/alpha/knobs", knobs)
    assert got.status == 422 and words in got.json["error"]["message"], got.body[:500]
    assert overrides_of(two) is None and two.get("/api/models/alpha").json["overridden"] == []


def test_a_model_is_added_by_repo_or_path_served_and_removed(two):
    got = two.post("/api/models", {"key": "extra", "repo": "org/extra", "aliases": ["mine"], "knobs": {"gpu-memory-utilization": 0.5, "seed": None},
                                   "env": {"A": 1}, "description": None})
    assert (got.status, got.headers["Location"], got.json["added"], got.json["served_names"]) == (201, "/api/models/extra", True, ["extra", "org/extra", "mine"])
    assert overrides_of(two)["models"]["extra"]["knobs"] == {"gpu-memory-utilization": 0.5, "seed": None}
    for spark in two.rig.sparks:
        two.rig.weights(spark, "org/extra")
    assert two.swap("extra").status == 200
    for method, path, body in (("DELETE", "/api/models/extra", None), ("PUT", "/api/models/extra", {"hidden": True})):
        refused = two.call(method, path, body)
        assert (refused.status, refused.code) == (409, "model_serving")
    assert two.swap("alpha").status == 200
    assert two.call("PUT", "/api/models/extra/knobs", {"z": 1}).status == two.call("PUT", "/api/models/extra", {"hidden": True}).status == 200
    assert two.call("DELETE", "/api/models/extra").json == {"deleted": "extra"} and overrides_of(two) == sc.OVERRIDES
    assert two.get("/api/models/extra").status == 404
    assert two.post("/api/models", {"key": "extra", "local_path": f"{two.rig.local}-2"}).status == 201


@pytest.mark.parametrize("body,status,code,words", [
    ({"key": "alpha", "repo": "a/b"}, 409, "model_exists", "alpha"),
    ({"key": "x", "repo": "org/alpha"}, 409, "name_taken", "claimed by alpha"),
    ({"key": "x", "repo": "a/b", "aliases": ["gpt-4o"]}, 409, "name_taken", "gpt-4o is claimed by alpha"),
    ({"key": "gpt-4o", "repo": "a/b"}, 409, "name_taken", "gpt-4o is claimed by alpha"),
    ({"key": "Bad Key", "repo": "a/b"}, 422, "bad_field", "key must match"),
    ({"key": 7, "repo": "a/b"}, 422, "bad_field", "key must match"),
    ({"repo": "a/b"}, 422, "bad_field", "key is needed"),
    ({"key": "x"}, 422, "bad_field", "exactly one of repo and local_path"),
    ({"key": "x", "repo": "a/b", "mod": "solo"}, 422, "bad_field", "did you mean mode?"),
    ({"key": "x", "repo": "a/b", "added": True}, 422, "bad_field", "is not a field of a model"),
    ({"key": "x", "repo": "a/b", "env": {"A B": 1}}, 422, "bad_field", "env: A B"),
    ({"key": "x", "repo": "a/b", "knobs": {"model": 1}}, 422, "bad_field", "knobs: model is set by"),
    *(({"key": "x", "local_path": path}, 422, "bad_field", "local_path: must") for path in (
        "models/x", "/etc/passwd", "ROOT/../etc", "ROOT/a/./b", "ROOT//a", "ROOT/a/", "//ROOT/a", "ROOT", "ROOT/a:b", "ROOT/a,b", "ROOT/a\nb", "ROOT/a\0b",
        "ROOT/\u202eb", "ROOT/\x85b", "ROOT/" + "x" * 2000, "ROOTx/y"))])
def test_a_model_that_may_not_be_added_is_refused_by_its_field_and_nothing_is_written(two, tmp_path, body, status, code, words):
    if "local_path" in body:
        body = {**body, "local_path": body["local_path"].replace("ROOT", str(tmp_path))}
    got = two.post("/api/models", body)
    assert (got.status, got.code) == (status, code) and words in got.json["error"]["message"], got.body
    assert overrides_of(two) is None and len(two.get("/api/models").json["models"]) == 5


def test_hostile_paths_and_values_of_an_added_model_stay_text_up_to_the_launch(two, tmp_path):
    path = f"{tmp_path}/a b'$(touch pwned)`id`"
    assert two.post("/api/models", {"key": "odd", "local_path": path, "args": ["$(id)", "\u202e"], "name": "\u202eevil\n"}).json["name"] == "\ufffdevil\ufffd"
    got = two.call("PUT", "/api/models/odd/knobs", {"x": "'; rm -rf /"}).json
    assert got["local_path"] == path and got["before"].startswith("cannot be launched: local_path") and got["after"] == got["before"]


def test_a_shipped_model_is_not_removed_but_hidden_and_brought_back(two):
    assert two.call("DELETE", "/api/models/beta").code == "not_added"
    for _ in range(2):
        assert two.call("PUT", "/api/models/beta", {"hidden": True}).json["hidden"] is True
    assert "beta" not in [m["key"] for m in two.get("/api/models").json["models"]] and overrides_of(two) == {**sc.OVERRIDES, "hidden": ["beta"]}
    assert [m["key"] for m in two.get("/api/models?hidden=true").json["models"] if m["hidden"]] == ["beta"]
    assert two.swap("beta").status == 404 and two.call("PUT", "/api/models/beta/knobs", {"x": 1}).json["after"] == "cannot be launched: it is hidden"
    assert two.post("/api/models", {"key": "beta", "repo": "a/b"}).code == "model_exists"
    assert two.post("/api/models", {"key": "other", "repo": "org/beta"}).status == 201
    assert two.call("PUT", "/api/models/beta", {"hidden": False}).code == "name_taken"
    assert two.call("DELETE", "/api/models/other").status == two.call("PUT", "/api/models/beta", {"hidden": False}).status == 200
    assert two.get("/api/models/beta").json["overridden"] == ["x"]
    assert two.call("PUT", "/api/models/beta", {}).code == "bad_field" and two.call("PUT", "/api/models/betta", {"hidden": True}).status == 404


def test_a_model_that_is_being_loaded_can_not_be_hidden(two):
    two.rig.behave("spark1", "org/beta", load=30)
    swap = two.post("/api/swap", {"model": "beta"}).json
    assert two.call("PUT", "/api/models/beta", {"hidden": True}).code == "model_serving"
    two.call("DELETE", f"/api/swap/{swap['id']}")
    two.idle()
    assert two.call("PUT", "/api/models/beta", {"hidden": True}).status == 200


def test_what_people_wrote_into_the_overrides_file_is_kept_and_its_comments_in_a_copy(two):
    path = two.data / "models-overrides.yaml"
    mine = "# mine\nknobs:\n  gone: {a: 1}   # a model that is no more\n  beta: {c: 3}\nnotes: [2026-01-01, é]\nhidden: [wide]\n"
    path.write_text(mine)
    path.chmod(0o664)
    real = two.data / "real.yaml"
    path.rename(real)
    path.symlink_to(real)
    assert two.call("PUT", "/api/models/alpha/knobs", {"b": 2}).status == 200
    assert path.is_symlink() and real.stat().st_mode & 0o777 == 0o664 and (two.data / "real.yaml.bak").read_text() == mine
    text = real.read_text()
    assert text.startswith("# Edit this by hand") and "\n  beta:\n    c: 3\n" in text
    assert yaml.safe_load(text) == {"models": {}, **yaml.safe_load(mine), "knobs": {"gone": {"a": 1}, "beta": {"c": 3}, "alpha": {"b": 2}}}
    assert two.call("PUT", "/api/models/alpha/knobs", {"b": 3}).status == 200 and (two.data / "real.yaml.bak").read_text() == mine
    before = real.stat().st_mtime_ns
    assert two.call("PUT", "/api/models/alpha/knobs", {"b": 3}).status == 200 and real.stat().st_mtime_ns == before      # nothing to do


@pytest.mark.parametrize("said,words", [("knobs: {alpha: [", "line 1"), ("knobs: [1]", "must be mappings"), ("hidden: {a: 1}", "must be mappings"), ("- a", "mapping at the top"),
                                        ("models:\n a: {}\n a: {}", "line 3: the key 'a' is given twice")])
def test_a_broken_overrides_file_is_named_and_not_written_over(two, said, words):
    path = two.data / "models-overrides.yaml"
    path.write_text(said)
    got = two.call("PUT", "/api/models/alpha/knobs", {"b": 2})
    assert (got.status, got.code) == (409, "overrides_broken") and words in got.json["error"]["message"] and got.json["error"]["path"] == str(path)
    assert path.read_text() == said


@pytest.mark.parametrize("below", ["file/x.yaml", "missing/x.yaml", "directory"])
def test_an_overrides_file_that_cannot_be_written_is_503_and_named(rig, start, tmp_path, below):
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    p = start(rig_env(rig, tmp_path, MODELS_OVERRIDES=str(tmp_path / below)), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    before = p.get("/api/models").json
    for method, path, body in (("PUT", "/api/models/alpha/knobs", {"b": 2}), ("POST", "/api/models", {"key": "x", "repo": "a/b"}), ("PUT", "/api/models/alpha", {"hidden": True})):
        got = p.call(method, path, body)
        assert (got.status, got.code) == (503, "overrides_unwritable") and str(tmp_path / below) in got.json["error"]["message"], got.body
    assert p.get("/api/models").json == before and "Traceback" not in p.said()


def test_a_full_disk_changes_neither_the_file_nor_the_catalog(tmp_path, monkeypatch):
    (tmp_path / "m.yaml").write_text("models: {a: {repo: x/y}}")
    (tmp_path / "o.yaml").write_text("knobs: {a: {b: 1}}\n")
    store = sc.ConfigStore(sc.parse_settings({}), {"models": str(tmp_path / "m.yaml"), "overrides": str(tmp_path / "o.yaml"), "services": str(tmp_path / "none")})

    def full(handle):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(sc.os, "fsync", full)
    with pytest.raises(sc.Refused, match="No space left") as e:
        store.edit("overrides", lambda doc, config: doc["knobs"].update(a={"b": 2}))
    assert (e.value.status, e.value.code) == (503, "overrides_unwritable") and (tmp_path / "o.yaml").read_text() == "knobs: {a: {b: 1}}\n"
    assert dict(store.current.models["a"].knobs) == {"b": 1} and sorted(p.name for p in tmp_path.iterdir()) == ["m.yaml", "o.yaml"]


# --- recipes

def imported(recipe, sparks=2):
    entry, notes = sc.import_recipe(yaml.safe_load(recipe) if isinstance(recipe, str) else recipe, sparks)
    models, problems = sc.parse_catalog({"models": {"it": entry}}, {}, ROOTS)
    assert problems == []
    return models["it"], notes


def serves_with(command, **more):
    return imported({"recipe_version": "1", "name": "n", "container": "vllm-node", "command": command, **more})


RECIPE = """
recipe_version: "1"
name: Nemotron  # a comment
description: >-
  two
  lines
model: nvidia/Other
container: vllm-node
container: vllm-node-tf5          # given twice
mods: []
build_args:
  - --tf5   # a comment after a list item
env:
  # nothing but comments
defaults:
  port: 8000
  host: 0.0.0.0
  tensor_parallel: 2
  kv: 6G
  util: 0.70
  spec: '{"method": "mtp", "n": 5}'
command: |
  vllm serve nvidia/Super  \\
    --port {port} --host {host} \\
    --served-model-name super nvidia/Super \\
    --gpu-memory-utilization {util} --kv-cache-memory-bytes {kv} \\
    --speculative-config '{spec}' \\
    --override-generation-config '{{"temperature": 0.7, "stop": ["it''s"]}}' \\
    --enable-prefix-caching --no-async-scheduling \\
    --middleware a.b --middleware c.d -O3 --lora-modules x=y z=w --seed=-1 \\
    -tp {tensor_parallel} --pipeline-parallel-size 1 --distributed-executor-backend ray \\
    
"""


def test_a_recipe_with_all_that_real_ones_hold_becomes_an_entry_whose_command_is_the_same():
    model, notes = imported(RECIPE)
    assert (model.name, model.repo, model.mode, model.aliases, model.image, model.env, model.description) == (
        "Nemotron", "nvidia/Super", "cluster", ("super",), "vllm-node-tf5", (), "two lines")
    assert dict(model.knobs) == {"gpu-memory-utilization": 0.7, "kv-cache-memory-bytes": "6G", "speculative-config": {"method": "mtp", "n": 5},
                                 "override-generation-config": {"temperature": 0.7, "stop": ["its"]}, "enable-prefix-caching": True,
                                 "no-async-scheduling": True, "lora-modules": ["x=y", "z=w"], "seed": -1}
    assert model.args == ("--middleware", "a.b", "--middleware", "c.d", "-O3") and notes == ["the image must be made with build_args: --tf5"]
    slot = sc.Slot("main", ("spark1", "spark2"), 8888, "vllm_node", "launch-cluster")
    argv = sc.engine_args(sc.claim_names({"it": model}, "")[0]["it"], slot)
    assert argv[:8] == ["--served-model-name", "it", "nvidia/Super", "super", "--port", "8888", "--tensor-parallel-size", "2"]
    assert argv[8:12] == ["--gpu-memory-utilization", "0.7", "--kv-cache-memory-bytes", "6G"] and "--seed=-1" in argv


@pytest.mark.parametrize("command,more,mode,knobs,note", [
    ("vllm serve a/b -tp {t}", {"defaults": {"t": 2}, "solo_only": True}, "solo", {}, "for one Spark"),
    ("vllm serve a/b -tp 2", {"cluster_only": True}, "cluster", {}, ""),
    ("vllm serve a/b", {"cluster_only": True, "env": {}, "mods": None, "defaults": None}, "cluster", {}, ""),
    ("vllm serve a/b -tp 1", {}, "solo", {}, ""),
    ("vllm serve a/b --tensor-parallel-size=4", {}, "cluster", {"tensor-parallel-size": 4}, "for 4 Sparks, and a cluster has 2"),
    ("vllm serve a/b -pp 2", {}, "cluster", {"tensor-parallel-size": 1, "pipeline-parallel-size": 2}, ""),
    ("vllm serve a/b --gpu-memory-utilization-gb {g}", {"defaults": {"g": 112}}, "solo", {}, "needs the mod gpu-mem-util-gb"),
    ("vllm serve a/b --gpu-memory-utilization-gb 112", {"mods": ["mods/gpu-mem-util-gb"]}, "solo", {"gpu-memory-utilization-gb": 112}, "mods: mods/gpu-mem-util-gb"),
    ("vllm serve a/b --api-key ${{KEY}} --x 1", {}, "solo", {"x": 1}, "--api-key ${KEY}"),
    ("vllm serve a/b --x `id`", {}, "solo", {}, "`id`"),
    ("vllm serve a/b --nnodes 2 --model c", {}, "solo", {}, "--nnodes 2"),
    ("\n# why\nvllm serve a/b \\  \n  --x 'y # z'  # don't\n\n", {}, "solo", {"x": "y # z"}, ""),
    ("vllm serve a/b --tokenizer_mode fast extra", {}, "solo", {"tokenizer-mode": ["fast", "extra"]}, ""),
    ("vllm serve a/b --x NaN --y 007 --z 1e3 --w true --v '' --u '[1]' --t 1.50", {}, "solo",
     {"x": "NaN", "y": "007", "z": "1e3", "w": "true", "v": "", "u": "[1]", "t": "1.50"}, ""),
    ("vllm serve a/b", {"recipe_version": "2"}, "solo", {}, "recipe_version is 2"),
    ("vllm serve a/b", {"env": {"A": 1, "B": None, "C": "$HOME/x", "D": ""}}, "solo", {}, "env B is left out"),
])
def test_what_a_recipe_says_of_sparks_values_and_shells_is_kept_or_told(command, more, mode, knobs, note):
    model, notes = serves_with(command, **more)
    assert (model.repo, model.mode, dict(model.knobs)) == ("a/b", mode, knobs) and (note in " | ".join(notes) if note else not notes), notes
    assert dict(model.env) == ({"A": "1", "D": ""} if more.get("env") else {})


@pytest.mark.parametrize("command,more,words", [
    ("vllm serve a/b {x.__class__}", {"defaults": {"x": 1}}, "{x.__class__}"), ("vllm serve a/b {x[0]}", {"defaults": {"x": "abc"}}, "{x[0]}"),
    ("vllm serve a/b {x!r}", {"defaults": {"x": 1}}, "{x!r}"), ("vllm serve a/b {x:>999999999}", {"defaults": {"x": 1}}, "{x:>9"),
    ("vllm serve a/b {}", {}, "{}"), ("vllm serve a/b {port}", {}, "{port}"), ("vllm serve a/b }", {}, "}"), ("vllm serve a/b ${KEY}", {}, "{KEY}"),
    ("vllm serve a/b {x}", {"defaults": {"x": None}}, "{x}"), ("vllm serve a/b {x}", {"defaults": {"x": [1]}}, "{x}"),
    ("vllm serve a/b | tee x", {}, "|"), ("vllm serve a/b > log 2>&1", {}, ">"), ("(vllm serve a/b)", {}, "("), ("vllm serve a/b 'x", {}, "quotation"),
    ("cd /tmp\nvllm serve a/b", {}, "a new line"), ("vllm serve a/b && id", {}, "&&"), ("vllm serve a/b # \\\n  --x 1", {}, "a new line"),
    ("uvicorn server:app", {}, "`vllm serve MODEL`"), ("vllm serve --x 1", {}, "`vllm serve MODEL`"), ("", {}, "`vllm serve MODEL`"),
    ("vllm serve a/b -tp auto", {}, "whole number"), ("vllm serve a/b", {"runtime": "sglang"}, "sglang"), ("vllm serve a/b", {"env": [1]}, "env cannot be a list"),
    (["vllm"], {}, "command cannot be a list")])
def test_a_recipe_that_cannot_be_imported_says_why(command, more, words):
    with pytest.raises(ValueError) as e:
        serves_with(command, **more)
    assert words in str(e.value)


@pytest.mark.parametrize("odd", ["a: !!int ''", "a: !!bool foo", "a: !!timestamp foo", "a: !!float x", "? !!int x\n: 1"])
def test_yaml_tags_that_lie_are_a_broken_file_and_nothing_worse(odd):
    with pytest.raises(ValueError, match="YAML"):
        sc.parse_yaml(odd.encode())


# === 5 services ===============================================================

TWO = {"spark1": sc.Spark("spark1", "a"), "spark2": sc.Spark("spark2", "b")}


@pytest.mark.parametrize("doc,where,words", [
    ({"slots": {"x": {"hosts": ["spark9"]}}}, "slots.x.hosts", "spark9 is not configured"),
    ({"slots": {"x": {"port": "80"}}}, "slots.x", "whole number"),
    ({"slots": {"x": {"backend": "none"}}}, "slots.x.backend", "none is not defined"),
    ({"slots": {"x": {"hots": []}}}, "slots.x.hots", "is not one of hosts"),
    ({"slots": {"x": {"container": "a b"}}}, "slots.x", "container name"),
    ({"slots": {"X y": {}}}, "slots.X y", "the name must match"),
    ({"slots": []}, "slots", ""),
    ({"backends": {"x": {"stop": "true"}}}, "backends.x", "both stop and launch"),
    ({"backends": {"x": {"stop": "a", "launch": "docker run '{model}'"}}}, "backends.x.launch", "stands inside quotes"),
    ({"backends": {"x": {"stop": "a", "launch": 'docker run "{model}"'}}}, "backends.x.launch", "stands inside quotes"),
    ({"backends": {"x": {"stop": "a", "launch": "b", "restart": "c"}}}, "backends.x.restart", "is not one of"),
    ({"services": {"x": {"kind": "nonsense"}}}, "services.x.kind", "must be one of"),
    ({"services": {"x": {"kind": "http", "host": "spark9", "port": 1}}}, "services.x.host", "spark9 is not configured"),
    ({"services": {"x": {"kind": "http"}}}, "services.x", "needs host and port"),
    ({"services": {"x": {"kind": "http", "url": "javascript:alert(1)"}}}, "services.x.url", "http://"),
    ({"nonsense": {}}, "nonsense", "not known here"),
    ({"slots": {"a": {}, "b": {"hosts": ["spark2"], "port": 9}}}, "slots.b.container", "vllm_node is slot a's already"),
    ({"slots": {"a": {}, "b": {"container": "x"}}}, "slots.b.port", "8888 is slot a's already"),
    ({"backends": {"x": {"stop": "rm -rf /srv/{model}", "launch": "b"}}}, "backends.x.stop", "{model} is not known to this command"),
    ({"backends": {"x": {"stop": "a", "launch": "b --since {since}"}}}, "backends.x.launch", "{since} is not known to this command"),
    ({"services": {"x": {"kind": ["a"], "host": "spark1", "port": 80}}}, "services.x.kind", "must be one of"),
    ({"services": {"x": {"kind": "nim", "host": "spark1", "port": 80, "health": 5}}}, "services.x", "must be a text"),
    ({"slots": {"main": {"hosts": [{"a": "b"}]}}}, "slots.main.hosts", "is not configured"),
    ({"slots": {"main": {"hosts": ["spark1"], 5: 1, "zz": 2}}}, "slots.main.5", "is not one of"),
])
def test_a_bad_entry_of_the_services_file_is_reported_where_it_stands(doc, where, words):
    layout, problems = sc.parse_layout(doc, TWO, sc.parse_settings({}))
    if doc == {"slots": []}:
        return
    [p] = problems
    assert ".".join(x for x in (p.entry, p.field) if x) == where and words in p.message, p


def test_a_broken_slot_does_not_bring_the_default_slot_into_being():
    layout, _ = sc.parse_layout({"slots": {"main": {"backend": "none"}}}, TWO, sc.parse_settings({}))
    assert layout.slots == {}


def test_braces_that_are_no_words_stay_as_they_are():
    t = sc.parse_template({"stop": "docker inspect -f '{{.State.Running}}' {container}", "launch": "x ${HOME} {model}"})
    model, slot = sc.ModelDef("k", "k", repo="o/n", served_names=("k",)), sc.Slot("s", ("spark1",), 1, "c", "b")
    assert sc.fill(t.stop, sc.template_words(model, slot, t)) == "docker inspect -f '{{.State.Running}}' c"
    assert sc.fill(t.launch, sc.template_words(model, slot, t)) == "x ${HOME} o/n"


# === 6 backends ===============================================================

PIECES = ["'", '"', "$(touch CANARY)", "`touch CANARY`", "\n", ";", "touch CANARY", "&", "|", ">CANARY", "*", "?", "[a]", "~", "-", "--", "\\", " ", "\t", "#",
          "!", "${IFS}", "$HOME", "ü", "日本", "\u202e", "{model}", "{since}", "%s", "=", "(", ")", "<", "\r", "a", "0"]


def hostile(count, seed=1):
    """count strings that a shell would love to misread, the empty one first."""
    rng = random.Random(seed)
    yield ""
    for _ in range(count - 1):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))


SHOW = '#!/bin/sh\nfor a in "$@"; do printf "%s\\0" "$a"; done >>"$OUT"\n'


def argv_through_sh(script, tmp_path, **env):
    """Run script with a real sh; what the stub programs were given, and a proof that nothing else ran."""
    out = tmp_path / "argv"
    out.unlink(missing_ok=True)
    got = subprocess.run(["sh", "-c", script], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "OUT": str(out), **env},
                         capture_output=True, timeout=10)
    assert not list(tmp_path.glob("**/CANARY")), script
    assert got.stderr == b"", (script, got.stderr)
    return out.read_bytes().decode().split("\0")[:-1]


@pytest.fixture
def stubs(tmp_path):
    for name in ("docker", "launch-cluster.sh"):
        (tmp_path / name).write_text(SHOW)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def test_every_hostile_value_arrives_unchanged_through_the_launcher_command(stubs):
    slot = sc.Slot("main", ("spark1",), 8888, "vllm_node", "launch-cluster")
    for value in hostile(300):
        model = sc.ModelDef("key", "n", repo="org/name", served_names=("key", "org/name"), knobs=(("flag", value), ("list", ["x" + value, value + "y"]), ("map", {"k": value})),
                            args=("--verbatim", value), env=(("NAME", value),))
        launch = sc.build_launch_command(model, slot, str(stubs))
        got = argv_through_sh(launch, stubs)
        assert got == ["--solo", "--name", "vllm_node", "-d", "exec", "env", f"NAME={value}", "vllm", "serve", "org/name", *sc.engine_args(model, slot)], value
        assert value in got[-1] and got[-2] == "--verbatim"


def test_every_hostile_value_arrives_unchanged_through_a_command_template(stubs):
    template = sc.parse_template({"stop": "docker rm -f {container}", "launch": "docker run {env} {mounts} image --model {model} --port {port} {extra_args} {served_names}"})
    slot = sc.Slot("main", ("spark1",), 8888, "c", "t")
    for value in hostile(300, seed=2):
        model = sc.ModelDef("key", "n", local_path="/models/" + value, served_names=("key",), knobs=(("flag", value),), args=(value,), env=(("NAME", value),))
        got = argv_through_sh(sc.build_launch_command(model, slot, template=template), stubs)
        flag = [f"--flag={value}"] if value.startswith("-") else ["--flag", value]
        path = "/models/" + value
        assert got == ["run", "-e", f"NAME={value}", "-v", f"{path}:{path}", "image", "--model", path, "--port", "8888", *flag, value, "key"], value


def test_every_hostile_launch_directory_and_swap_id_stays_one_word(stubs):
    slot = sc.Slot("main", ("spark1",), 8888, "vllm_node", "launch-cluster")
    model = sc.ModelDef("key", "n", repo="org/name", served_names=("key",))
    for value in hostile(120, seed=3):
        if "/" in value or not value.strip("."):
            continue
        for form in (str(stubs) + "/" + value, "~/" + value):
            folder = stubs / value
            folder.mkdir(exist_ok=True)
            shutil.copy(stubs / "launch-cluster.sh", folder)
            assert argv_through_sh(sc.build_launch_command(model, slot, form), stubs)[:1] == ["--solo"], value
            shutil.rmtree(folder)


def test_every_hostile_value_survives_the_whole_way_through_ssh_gate_and_shells(rig, stubs, monkeypatch):
    monkeypatch.setenv("PATH", f"{rig.bin}:{os.environ['PATH']}")
    hosts = sc.Hosts([sc.Spark("spark1", "spark1")])
    try:
        for i, value in enumerate(hostile(60, seed=4)):
            command = f"OUT={sc.quote_arg(stubs / 'argv')} {sc.quote_arg(stubs / 'docker')} {sc.quote_arg(value)}"
            (stubs / "argv").unlink(missing_ok=True)
            assert hosts.run("spark1", sc.launch_once_script(f"id-{i}", command), 10).kind == "ok"
            assert (stubs / "argv").read_bytes().decode().split("\0")[:-1] == [value]
            assert not list(rig.root.glob("**/CANARY"))
    finally:
        hosts.close()


def test_a_nul_is_refused_since_no_argument_can_hold_it():
    with pytest.raises(ValueError, match="NUL"):
        sc.quote_arg("a\0b")


def test_a_local_path_that_the_launcher_would_split_is_refused_in_words():
    model = sc.ModelDef("k", "k", local_path="/models/my model", served_names=("k",))
    with pytest.raises(ValueError, match="spaces or shell characters"):
        sc.build_launch_command(model, sc.Slot("main", ("spark1",), 1, "vllm_node", "launch-cluster"))


def test_a_secret_in_a_models_environment_is_not_shown():
    model = sc.ModelDef("k", "k", repo="o/n", served_names=("k",), env=(("HF_TOKEN", "hf_s3cret it's"), ("PLAIN", "x")))
    config = sc.Config(sc.parse_settings({}), {}, {}, sc.Layout({}, {}, {}), ())
    plan = sc.make_plan(model, sc.Slot("main", ("spark1",), 1, "vllm_node", "launch-cluster"), config)
    assert "s3cret" in plan.launch and "s3cret" not in plan.shown and "PLAIN=x" in plan.shown and plan.hidden == ("hf_s3cret it's",)
    assert model.public()["env"] == {"HF_TOKEN": "***", "PLAIN": "x"}


def test_a_gate_lets_one_launch_through_however_often_it_is_tried(stubs):
    script = sc.launch_once_script("swap-1", "echo launched >>hits; echo said; exit 7")
    run = lambda: subprocess.run(["sh", "-c", f"cd {stubs}; {script}"], env={"PATH": "/usr/bin:/bin", "HOME": str(stubs)}, capture_output=True, text=True, timeout=10)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda _: run(), range(8)))
    assert (stubs / "hits").read_text() == "launched\n"
    assert {g.returncode for g in got} == {7} and all(g.stdout.endswith("said\n") and g.stdout.startswith("since 20") for g in got)


def test_a_gate_whose_launcher_was_killed_does_not_wait_for_ever(stubs):
    folder = stubs / ".cache/sparkctl/swap-1"
    folder.mkdir(parents=True)
    (folder / "pid").write_text("999999999")
    got = subprocess.run(["sh", "-c", sc.launch_once_script("swap-1", "echo never")], env={"PATH": "/usr/bin:/bin", "HOME": str(stubs)}, capture_output=True, text=True, timeout=20)
    assert got.returncode == 75 and "interrupted" in got.stdout


# === 7 engine =================================================================

REAL_LINES = (  # as vLLM wrote them, and what they must be understood as
    ("(Worker pid=45) INFO 11-23 10:06:51 [cpu_model_runner.py:68] Starting to load model /lab/models/tiny-qwen2...", "progress", "Loading weights"),
    ("Loading safetensors checkpoint shards:  45% Completed | 5/11 [00:14<00:17,  2.98s/it]", "progress", "Loading weights, 5 of 11 files"),
    ("(Worker_TP0 pid=1700) Loading safetensors using InstantTensor loader:   6% Completed | 7320/120567 [00:01<00:09]", "progress", "Loading weights, 7320 of 120567 tensors"),
    ("(EngineCore_DP0 pid=1356) (RayWorkerWrapper pid=383, ip=10.0.0.2) INFO 11-23 10:00:00 [x.py:1] Model loading took 61.204518 GiB memory and 33.1 seconds", "progress", "Weights loaded, 61.20 GiB"),
    ("INFO:     Application startup complete.", "progress", "Waiting for the engine's first answer"),
    ("(APIServer pid=1) ERROR 11-23 09:53:14 [serving.py:274] Error with model error=ErrorInfo(message='The model `wrong` does not exist.", "none", ""),
    ("(APIServer pid=1) WARNING 11-23 09:53:14 [x.py:2] something about 401 Client Error", "none", ""),
    ("vllm: error: unrecognized arguments: --no-such-flag 7", "bad_flag", "vLLM refuses its arguments: unrecognized arguments: --no-such-flag 7"),
    ("vllm serve: error: argument --dtype: invalid choice: 'float7' (choose from 'auto')", "bad_flag", "vLLM refuses its arguments: argument --dtype: invalid choice"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.12 GiB. GPU 0 has", "out_of_memory", "the GPU ran out of memory while loading (it wanted 6.12 GiB more)"),
    ("(EngineCore pid=9) ERROR 11-23 09:57:11 [core.py:1510] ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "out_of_memory", "no room for the KV cache"),
    ("ValueError: To serve at least one request with the model's max seq len (131072), (16.00 GiB KV cache is needed, which is larger than the available KV cache memory (4.20 GiB). Based on the available memory, the estimated maximum model length is 34400.", "kv_cache_too_small", "131072 tokens needs 16.00 GB"),
    ("  Value error, User-specified max_model_len (1000000) is greater than the derived max_model_len (max_position_embeddings=4096.0 or", "bad_flag", "max-model-len 1000000 is more than the model's own 4096"),
    ("OSError: [Errno 98] Address already in use", "port_taken", "port is taken"),
    ("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}", "engine_failed", "failed to start"),
    ("requests.exceptions.HTTPError: 403 Client Error. Cannot access gated repo for url https://x", "gated_repo", "refuses access"),
    ("OSError: [Errno 28] No space left on device", "disk_full", "disk is full"),
    ("Error in memory profiling. Initial free memory 1 GiB", "memory_changed", "another process"),
    ("ValueError: Free memory on device cuda:0 (20.1/121.7 GiB) on startup is less than desired GPU memory utilization (0.9, 109.5 GiB). Decrease GPU", "out_of_memory", "needs 109.5 of 121.7 GB, and 20.1 GB are free"),
    ("RuntimeError: Failed to load model - not enough GPU memory.", "out_of_memory", "the weights do not fit"),
    ("kernel: NVRM: nvAssertOkFailedNoLog: Out of memory [NV_ERR_NO_MEMORY] (0x00000051)", "out_of_memory", "its kernel ended a process"),
    ("kernel: python3 invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE|__GFP_COMP|__GFP_ZERO), order=0", "out_of_memory", "its kernel ended a process"),
    ("RuntimeError: Worker proc VllmWorker-0 died unexpectedly (exit code: 1), shutting down executor.", "engine_failed", "failed to start"),
)


@pytest.mark.parametrize("line,kind,words", REAL_LINES, ids=range(len(REAL_LINES)))
def test_a_line_of_vllms_log_is_understood(line, kind, words):
    got = sc.classify_log_line(line)
    assert (got.code or got.kind) == kind and words in got.text
    assert bool(got.remedy) == (got.kind == "fatal")


def test_only_the_beginning_of_an_endless_line_is_read():
    assert sc.classify_log_line("x" * 3000 + " CUDA out of memory").kind == "none"


def test_a_root_cause_outranks_the_summary_that_follows_it():
    cause, summary = (sc.classify_log_line(l) for l in ("torch.OutOfMemoryError: CUDA out of memory.", "EngineCore failed to start."))
    assert cause.rank < summary.rank


class OneAnswer(threading.Thread):
    """A server that answers every request with the same bytes."""

    def __init__(self, answer):
        super().__init__(daemon=True)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.answer, self.seen = answer, []
        self.start()

    @property
    def port(self):
        return self.sock.getsockname()[1]

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                c, _ = self.sock.accept()
                self.seen.append(c.recv(65536))
                c.sendall(self.answer)
                c.close()


@pytest.mark.parametrize("answer,state", [
    (b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n", "loading"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "foreign"),
    (b"HTTP/1.1 401 no\r\nContent-Length: 0\r\n\r\n", "foreign"),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 24\r\n\r\n{"data": [{"id": "mine"}', "foreign"),
    (b'HTTP/1.1 200 OK\r\nContent-Length: 26\r\n\r\n{"data": [{"id": "mine"}]}', "serving"),
    (b"SSH-2.0-OpenSSH_9\r\n", "foreign"), (b"", "silent"),
])
def test_what_answers_on_a_port_is_never_guessed(answer, state):
    server = OneAnswer(answer)
    assert sc.probe_vllm_endpoint(sc.Endpoint("127.0.0.1", server.port)).state == state
    server.sock.close()


def test_an_engine_that_drips_its_answer_costs_no_more_than_the_time_limit():
    class Drip(OneAnswer):
        def run(self):
            with contextlib.suppress(OSError):
                c, _ = self.sock.accept()
                while True:
                    c.sendall(b"H")
                    self.seen.append(1)
                    time.sleep(0.05)
    server = Drip(b"")
    assert sc.probe_vllm_endpoint(sc.Endpoint("127.0.0.1", server.port), 0.5).state == "silent"
    assert len(server.seen) < 40
    server.sock.close()


def test_more_output_than_a_command_may_have_ends_it():
    hosts = sc.Hosts([sc.Spark("here", "local")])
    try:
        assert "MiB of output" in hosts.run("here", "yes", 60).err
    finally:
        hosts.close()


def test_a_port_where_nothing_listens_is_silent():
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    assert sc.probe_vllm_endpoint(sc.Endpoint("127.0.0.1", port)).state == "silent"


# === 8 swap rules =============================================================

AGREED = """
queued -> checking, failed, cancelled
checking -> draining, failed, cancelled, planned
draining -> stopping, failed, cancelled
stopping -> launching, ready, failed, cancelled
launching -> loading, failed, cancelled
loading -> warming, failed, cancelled
warming -> ready, failed, cancelled
ready -> (end)
failed -> (end)
cancelled -> (end)
planned -> (end)
"""
PLAN = sc.Plan("main", "m", ("m",), ("spark1",), 1, "c", "b", "launch", "launch", "stop", "", "")


def test_the_transition_table_is_the_agreed_one():
    assert transitions() == AGREED.strip().split("\n")


def test_a_thousand_random_walks_never_break_an_invariant_and_always_end():
    for seed in range(1000):
        rng, now = random.Random(seed), 1000.0
        unload = rng.random() < 0.2
        s = sc.Swap("id", "main", None if unload else "m", started_at=sc.utc(now), phase_began=now, phases=(("queued", sc.utc(now), None),),
                    dry_run=rng.random() < 0.1, rollback=False)
        trail = []
        for _ in range(30):
            wanted, now = rng.choice(sc.PHASES), now + rng.random()
            trail.append(wanted)
            facts = {"plan": None if unload else PLAN, "touched": wanted in ("stopping", "launching", "loading", "warming", "ready") or s.touched}
            if wanted == "failed":
                facts["error"] = {"code": "x"}
            before = s
            try:
                s = sc.advance(s, wanted, now, **facts)
            except ValueError:
                assert s is before
                continue
            assert s.seq == before.seq + 1 and wanted in sc.TRANSITIONS[before.phase], (seed, trail)
            assert sc.Swap.from_journal(json.loads(json.dumps(s.journal()))) == s, (seed, trail)
        assert s.phase in sc.PHASES


@pytest.mark.parametrize("broken", [
    {"phase": "failed", "ended_at": "x"}, {"phase": "ready"}, {"phase": "loading"}, {"phase": "planned", "ended_at": "x"},
    {"ended_at": "x"}, {"rollback_of": "y"}, {"phase": "nonsense"},
])
def test_a_swap_that_breaks_an_invariant_is_refused(broken):
    with pytest.raises(ValueError, match="breaks the rule|nonsense"):
        sc.check_swap(sc.Swap(**{"id": "i", "slot": "main", "model": "m", **broken}))


@pytest.mark.parametrize("samples,need,back", [
    ([], 0, False),
    ([(0, 50 << 20), (0.5, 50 << 20)], 0, False),                           # not yet a second
    ([(0, 50 << 20), (0.5, 50 << 20), (1.1, 50 << 20)], 40 << 20, True),
    ([(0, 10 << 20), (0.5, 30 << 20), (1.1, 50 << 20)], 40 << 20, False),   # still rising
    ([(0, 50 << 20), (0.5, 50 << 20), (1.1, 50 << 20)], 49 << 20, False),   # covers the need, not the floor
])
def test_memory_is_back_when_it_covers_the_need_and_is_flat_for_a_second(samples, need, back):
    assert sc.reclaimed(samples, need) is back


def test_an_estimate_counts_the_rest_of_this_phase_and_the_usual_length_of_the_later_ones():
    s = sc.Swap("i", "main", "m", phase="loading", phase_began=100.0, fraction=0.0, plan=PLAN, touched=True)
    assert sc.estimate(s, {"loading": 60, "warming": 2}, 110.0) == (52.0, 60)
    assert sc.estimate(s, {}, 110.0) == (None, None)
    import dataclasses
    assert sc.estimate(dataclasses.replace(s, fraction=0.5), {}, 110.0)[0] == 10.0


def test_the_need_for_memory_follows_the_knobs():
    m = sc.ModelDef("k", "k", repo="o/n", size_gb=60, knobs=(("gpu_memory_utilization", 0.5),))
    assert sc.memory_need_gb(m, 120, 1)[:2] == (60.0, 60.0)
    assert sc.memory_need_gb(sc.ModelDef("k", "k", size_gb=60, knobs=(("kv-cache-memory-bytes", "8G"),)), 120, 2)[:2] == (42.0, 30.0)
    assert sc.memory_need_gb(sc.ModelDef("k", "k"), 100, 1)[0] == pytest.approx(92)


def seen(total="127600000", available="120000000", driver="580.1", held=(), engine=None, tells=True, room_gb=100.0, docker=None):
    """What parse_spark makes of a Spark; held: {container: GiB}; engine: GiB that vllm_node holds."""
    names = {"c" * 64: "vllm_node", **{f"{i:064x}": name for i, name in enumerate(held, 1)}}
    apps = {i: gb for i, gb in enumerate([engine, *dict(held).values()]) if gb}
    return {**sc.parse_spark(""), "memory": sc.parse_meminfo([f"MemTotal: {total} kB", f"MemAvailable: {available} kB", f"MemFree: {available} kB"]) if tells else {},
            "gpu": {"driver": driver}, "apps": apps, "container_of": {i: list(names)[i] for i in apps}, "container_gb": {}, "containers": None if docker else {k: (v, "Up") for k, v in names.items()},
            "room_gb": room_gb, "failed": {"docker": docker} if docker else {}}


def look(facts=None, model=None, **more):
    """A Look at a healthy pair with nothing running, changed by facts of spark1; what `memory` names is of seen()."""
    healthy = {"launcher": ["yes"], "weights": ["/w"], "real": ["/w"], "weights_kb": ["62914560"], "image": ["sha256:aa"],
               "clock": ["1000.1"], "asked": ["1000"], "unsure": ["0.2"],
               "flag": ["--solo", "--name", "dispatched in background"]}
    settings = sc.parse_settings({"SPARK1_HOST": "a", "SPARK2_HOST": "b"})
    slot = sc.Slot("main", ("spark1", "spark2"), 8888, "vllm_node", "launch-cluster")
    config = sc.Config(settings, TWO, {}, sc.Layout({"main": slot}, {}, {}), ())
    change = dict(facts or {})
    memory = change.pop("memory", {})
    fill = lambda change, memory: (sc.collections.defaultdict(list, {**healthy, **change}), seen(**memory))
    model = model or sc.ModelDef("k", "k", repo="o/n", knobs=(("gpu-memory-utilization", 0.6),))
    given = {"slot": slot, "config": config, "used": ("spark1",), "probe": sc.Probe("silent"), "current": None,
             "facts": {"spark1": fill(change, memory), "spark2": fill({}, {})}, "model": model, **more}
    return sc.Look(**given)


def verdicts(looked):
    return {c.name: (c.status, c.detail) for c in sc.evaluate_checks(looked)}


def test_a_healthy_pair_passes_every_check():
    assert {name: status for name, (status, _) in verdicts(look()).items()} == dict.fromkeys(("reachable", "launcher", "docker", "port", "image", "weights", "disk", "memory"), "ok")


@pytest.mark.parametrize("facts,name,status,words", [
    ({"launcher": ["no"]}, "launcher", "fail", "no executable launch-cluster.sh"),
    ({"flag": ["--solo"]}, "launcher", "fail", "does not know -d exec"),
    ({"env_container": ["'other'"]}, "launcher", "fail", "makes it use other"),
    ({"memory": {"docker": ("fails", "permission denied")}}, "docker", "fail", "spark1: docker fails: permission denied"),
    ({"memory": {"docker": ("is not there", "")}}, "docker", "fail", "spark1: docker is not there"),
    ({"listening": ["8888"]}, "port", "fail", "something answers on port 8888"),
    ({"listening": ["8888"], "engine": ["alive"]}, "port", "ok", "will be stopped"),
    ({"engine": ["alive"]}, "rollback", "warn", "cannot be restored"),
    ({"weights": []}, "weights", "fail", "o/n is not on spark1"),
    ({"missing": ["model-2.safetensors"]}, "weights", "fail", "without model-2.safetensors"),
    ({"missing": ["ab.0a1b2c3d.incomplete"]}, "weights", "fail", "still being downloaded"),
    ({"image": []}, "image", "fail", "vllm-node is not on spark1"),
    ({"memory": {"room_gb": 0.9}}, "disk", "fail", "0.9 GB of disk left"),
    ({"memory": {"room_gb": 4.8}}, "disk", "warn", "4.8 GB of disk left"),
    ({"removes_ipc": ["yes"]}, "session", "warn", "RemoveIPC"),
    ({"weights_kb": ["104857600"]}, "memory", "fail", "100.0 GB of weights"),
    ({"memory": {"available": "52428800"}}, "memory", "fail", "needs 73.0 GB"),
    ({"memory": {"available": "52428800"}, "engine": ["alive"]}, "memory", "warn", "is not known"),
    ({"memory": {"tells": False}}, "memory", "warn", "does not tell"),
])
def test_a_check_says_what_is_wrong_and_what_to_do(facts, name, status, words):
    looked = look(facts)
    assert verdicts(looked)[name][0] == status and words in verdicts(looked)[name][1]
    assert all(c.remedy for c in sc.evaluate_checks(looked) if c.status == "fail")


BIG, SMALL = {"weights_kb": ["62914560"]}, {"weights_kb": ["10485760"]}         # 60 GB, 10 GB
OLD = sc.Plan("main", "m", ("m",), ("spark1",), 8888, "c", "b", "l", "l", "s", "", "", need_gb=60)


@pytest.mark.parametrize("facts,knobs,current,status,detail,remedy", [
    (BIG, {"gpu-memory-utilization": 0.7}, None, "ok", "needs 85.2 GB (0.7 of 121.7 GB), 114.4 GB can be free", ""),
    (BIG, {"gpu-memory-utilization": 0.93}, None, "fail", "needs 113.2 GB", "lower gpu-memory-utilization to 0.89"),
    (BIG, {}, None, "warn", "that is tight", "lower gpu-memory-utilization to 0.89"),
    (BIG, {"gpu-memory-utilization": 0.4}, None, "fail", "60.0 GB of weights and 1 GB to work in do not fit into 48.7 GB", "raise gpu-memory-utilization to 0.55"),
    (BIG, {"gpu-memory-utilization": 0.52}, None, "warn", "leaves 3.3 GB for KV cache", "raise gpu-memory-utilization"),
    ({"weights_kb": ["136314880"]}, {"gpu-memory-utilization": 0.9}, None, "fail", "130.0 GB of weights", "use more Sparks"),
    (SMALL, {"kv-cache-memory-bytes": "100G"}, None, "fail", "needs 114.0 GB (weights, KV cache and 4 GB to work in)", "lower kv-cache-memory-bytes to 94G"),
    (SMALL, {"gpu-memory-utilization-gb": 113}, None, "fail", "needs 113.0 GB (113 GB)", "lower gpu-memory-utilization-gb to 108"),
    (SMALL, {"gpu-memory-utilization": "nan"}, None, "warn", "needs 112.0 GB (0.92", "lower"),
    (SMALL, {"kv-cache-memory-bytes": "20G"}, None, "ok", "needs 34.0 GB", ""),
    ({**BIG, "memory": {"available": "41943040"}, "engine": ["alive"]}, {"gpu-memory-utilization": 0.6}, OLD, "ok", "100.0 GB can be free, 60.0 of them given back", ""),
    ({**BIG, "engine": ["alive"], "memory": {"available": "41943040", "engine": 72.0, "held": {"kokoro": 20.0}}},
     {"gpu-memory-utilization": 0.9}, None, "warn", "112.0 GB can be free, 72.0 of them given back", "stop kokoro (20.0 GB)"),
    ({**BIG, "memory": {"available": "41943040", "held": {"kokoro": 30.0}}},
     {"gpu-memory-utilization": 0.6}, None, "fail", "needs 73.0 GB (0.6 of 121.7 GB), and 40.0 GB can be free", "stop kokoro (30.0 GB), or take a smaller"),
    ({**SMALL, "memory": {"available": "127500000"}}, {"gpu-memory-utilization": 0.94}, None, "warn", "leaves 7.3 GB to the system", "lower gpu-memory-utilization"),
])
def test_the_memory_check_tells_what_fits_and_which_knob_to_turn(facts, knobs, current, status, detail, remedy):
    model = sc.ModelDef("k", "k", repo="o/n", knobs=tuple(knobs.items()))
    check, = [c for c in sc.evaluate_checks(look(facts, model, current=current)) if c.name == "memory"]
    assert check.status == status and detail in check.detail and remedy in check.remedy, check
    assert check.numbers["host"] == "spark1" and check.numbers["need"] > 0


def two_sparks(**changes):
    """Verdicts for a cluster model where spark2 differs."""
    wide = sc.ModelDef("w", "w", repo="o/w", mode="cluster", knobs=(("gpu-memory-utilization", 0.6),))
    base = look(model=wide, used=("spark1", "spark2"))
    base.there["spark2"] = base.there["spark2"] | {k: [v] for k, v in changes.items()}
    base.seen["spark2"] = seen(driver=changes.get("driver", "580.1"))
    return verdicts(base)


@pytest.mark.parametrize("changes,name,status,words", [
    ({"image": "sha256:bb"}, "image", "fail", "is another image on each of spark1, spark2"),
    ({"driver": "580.2"}, "driver", "warn", "different GPU drivers"),
    ({"clock": "1010.5", "asked": "1000", "unsure": "0.2"}, "clock", "warn", "spark1 and spark2 are 10 s apart"),
    ({"weights": "/hub/snapshots/other/"}, "weights", "warn", "different revisions"),
])
def test_the_sparks_of_a_cluster_are_compared(changes, name, status, words):
    assert {status for status, _ in two_sparks().values()} == {"ok"}
    found = two_sparks(**changes)
    assert found[name][0] == status and words in found[name][1], found


def test_a_cluster_model_wants_the_other_slots_of_its_sparks_empty_and_a_solo_one_does_not():
    other = sc.Plan("second", "m", ("m",), ("spark2",), 1, "c", "b", "", "", "", "", "")
    wide = sc.ModelDef("w", "w", repo="o/w", mode="cluster", knobs=(("gpu-memory-utilization", 0.6),))
    assert "unload second first" in [c.remedy for c in sc.evaluate_checks(look(model=wide, used=("spark1", "spark2"), others=[other]))]
    assert "neighbours" not in verdicts(look(others=[other]))


def test_an_engine_that_is_gone_gives_no_memory_back():
    model = sc.ModelDef("k", "k", repo="o/n", knobs=(("gpu-memory-utilization", 0.9),))
    for engine, status in (([], "fail"), (["alive"], "ok")):
        check, = [c for c in sc.evaluate_checks(look({**SMALL, "engine": engine, "memory": {"available": "60000000"}}, model, current=OLD)) if c.name == "memory"]
        assert check.status == status and check.numbers["given_back"] == (60.0 if engine else 0.0)


def test_what_lowers_a_knob_makes_the_check_pass():
    rng = random.Random(4)
    for _ in range(2000):
        total, back = rng.uniform(20, 130), rng.uniform(0, 60)
        fit = sc.Fit("s", total, rng.uniform(0, total - 10), back, rng.uniform(0.3, 1) * total, rng.uniform(0, 60), "how", "gpu-memory-utilization", {}, False)
        _, _, remedy, _ = fit.verdict()
        if m := re.match(r"(lower|raise) \S+ to ([\d.]+)", remedy):
            need = float(m[2]) * total
            assert (need < fit.need) == (m[1] == "lower") and fit._replace(need=need).verdict()[0] in ("ok", "warn"), (fit, remedy)


def test_numbers_of_a_spark_may_be_anything():
    for odd in ("abc", "1700000000.N", "²", "9" * 400, "-1", "", "nan"):
        base = look({"clock": [odd], "weights_kb": [odd]})
        assert {c.status for c in sc.evaluate_checks(base)} <= {"ok", "warn", "fail"}
    for out in ('{"verdict": "ok", "said": 1}', "[" * 5000, "{}", ""):
        assert sc.parse_verdict(sc.Result("ok", 0, out, ""))[0] == "unknown"


def test_a_clash_of_names_or_a_container_with_an_odd_name_forges_no_number():
    check, = [c for c in sc.evaluate_checks(look({**BIG, "memory": {"held": {"total": 7.0, "x" * 200: 3.0}}})) if c.name == "memory"]
    assert check.numbers["total"] == 121.7 and check.numbers["others"]["total"] == 7.0
    told = sc.parse_spark("@docker\n" + "a" * 64 + " " + "n" * 200 + " Up\n" + "b" * 64 + " fine Up\n" + "c" * 64 + " \x1b[31m Up\n@end\n")
    assert [name for name, _ in told["containers"].values()] == ["fine"]


def test_secrets_are_hidden_however_they_are_spelled():
    model = sc.ModelDef("k", "k", repo="o/n", served_names=("k",), env=(("HF_TOKEN", "hf_s3cret it's"),), args=("--hf-token", "args3cret", "--api-key=eqs3cret", "--port", "plain"),
                        knobs=(("api-key", ["sk-AAA1", "sk-BBB2"]), ("hf-token", "-dash s3c"), ("plain", "seen"), ("map-key", {"a": "deep1"})))
    config = sc.Config(sc.parse_settings({}), {}, {}, sc.Layout({}, {}, {}), ())
    plan = sc.make_plan(model, sc.Slot("main", ("spark1",), 1, "vllm_node", "launch-cluster"), config)
    everything = plan.shown + json.dumps(model.public()) + sc.hide("Executing command: env HF_TOKEN=hf_s3cret\\ it\\'s vllm --x sk-AAA1", model.secrets())
    for secret in ("s3cret", "args3cret", "eqs3cret", "sk-AAA1", "sk-BBB2", "dash s3c", "deep1"):
        assert secret not in everything, secret
    assert "seen" in everything and "plain" in everything and "sk-BBB2" in plan.launch


# === 9 swap ===================================================================

def check_of(reply, name):
    """(status, detail, remedy) of the one check of that name in a swap or a validation."""
    found, = [c for c in reply.json["checks"] if c["name"] == name]
    return found["status"], found["detail"], found["remedy"]


def asked_parser(rig, spark="spark1"):
    path = rig.spark(spark) / "parsed"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("knobs,said", [
    ({"no-such-flag": 7}, "unrecognized arguments: --no-such-flag 7"),
    ({"dtype": "float7"}, "argument --dtype: invalid choice: 'float7'"),
    ({"max-num-seqs": "many"}, "argument --max-num-seqs: invalid int value: 'many'"),
    ({"max-num-seqs": True}, "argument --max-num-seqs: expected one argument"),
    ({"speculative-config": "{x"}, "argument --speculative-config/-sc: invalid loads value: '{x'"),
    ({"enable-auto-tool-choice": True}, "--enable-auto-tool-choice requires --tool-call-parser"),
])
def test_arguments_that_vllm_refuses_are_told_in_its_words_before_anything_is_touched(two, tmp_path, knobs, said):
    two.rig.parser("spark1")
    (tmp_path / "models.yaml").write_text(json.dumps({"models": {"alpha": {"repo": "org/alpha", "knobs": {"gpu-memory-utilization": 0.5, **knobs}}}}))
    until(lambda: set(two.get("/api/models/alpha").json.get("knobs", {})) >= set(knobs), what="the new catalog")
    got = two.post("/api/swap/alpha/validate")
    assert got.status == 200 and not got.json["ok"] and check_of(got, "flags")[0] == "fail"
    assert check_of(got, "flags")[1].startswith("vLLM refuses its arguments: ") and said in check_of(got, "flags")[1] and "knobs or args" in check_of(got, "flags")[2]
    got = two.swap("alpha")
    assert got.status == 502 and errors_of(got.json)[0] == "check_failed" and said in errors_of(got.json)[1]
    assert not launches(two.rig) and [p["phase"] for p in got.json["phases"]] == ["queued", "checking", "failed"]
    assert len(asked_parser(two.rig)) == 1
    assert two.swap("alpha", skip_checks=["flags"], dry_run=True).status == 200 and len(asked_parser(two.rig)) == 1


def test_vllms_parser_is_asked_once_for_an_image_and_its_arguments(two):
    rig = two.rig
    rig.parser("spark1")
    first = two.post("/api/swap/alpha/validate", {"slot": "main"})
    assert first.json["ok"] and check_of(first, "flags")[0] == "ok" and "exec vllm serve org/alpha" in " ".join(first.json["commands"])
    assert two.get("/api/swap").json["recent"] == [] and not rig.containers("spark1")
    assert two.swap("alpha").status == 200 and two.swap("alpha", restart=True).status == 200
    (argv,) = map(json.loads, asked_parser(rig))
    running = [a for _, a in rig.engines("spark1")][0]
    assert argv == running                      # exactly what is then run
    rig.control("spark1", "image_id", "another build")
    assert two.swap("alpha", restart=True).status == 200 and len(asked_parser(rig)) == 2


@pytest.mark.parametrize("changed,words", [
    ({"vllm/entrypoints/cli/serve.py": "raise ImportError('moved')"}, "ImportError('moved')"),
    ({"vllm/utils/argparse_utils.py": ""}, "cannot import name 'FlexibleArgumentParser'"),
    ({"vllm/entrypoints/cli/serve.py": "import os; print('hm', flush=True); os._exit(7)"}, "cannot tell"),
])
def test_a_vllm_whose_insides_have_moved_is_a_warning_and_no_refusal(two, changed, words):
    two.rig.parser("spark1", **changed)
    got = two.swap("alpha")
    assert got.status == 200 and check_of(got, "flags")[0] == "warn" and words in check_of(got, "flags")[1]


def test_one_validation_at_a_time_and_none_for_what_is_not_there(two):
    two.rig.control("spark1", "docker_hangs")
    first = background(lambda: two.post("/api/swap/alpha/validate"))
    until(lambda: [c for c in two.rig.calls("spark1") if "LANG" not in c and "docker top" in c["command"]])
    second = two.post("/api/swap/alpha/validate")
    assert (second.status, second.code) == (409, "validate_running") and second.headers["Retry-After"]
    assert check_of(first.result(60), "docker") == ("fail", "spark1: docker hangs", "start docker, and add the ssh user to the group docker")
    assert two.post("/api/swap/alpah/validate").json["error"]["nearest"] == "alpha"


def test_every_check_but_the_first_two_can_be_skipped_by_name(two):
    for name in sc.CHECKS:
        got = two.post("/api/swap?wait=60", {"model": "alpha", "dry_run": True, "skip_checks": [name]})
        assert got.status == (422 if name in ("reachable", "roots") else 200), name
    two.rig.control("spark1", "images", "something-else")
    got = two.swap("alpha")
    assert got.status == 502 and "vllm-node is not on spark1" in errors_of(got.json)[1]
    got = two.swap("alpha", dry_run=True, skip_checks=["image"])
    assert check_of(got, "image")[0] == "skipped" and "skipped" in "".join(l for l in (two.data / "swaps" / f"{got.json['id']}.log").read_text().splitlines() if "image" in l)


WEIGHTS = (     # name, what is changed in the snapshot, status, words
    ("all is there", lambda s: None, "ok", ""),
    ("a shard is gone", lambda s: (s / "model-00002-of-00002.safetensors").unlink(), "fail", "model-00002-of-00002.safetensors"),
    ("a link leads nowhere", lambda s: (s / "model-00001-of-00002.safetensors").resolve().unlink(), "fail", "without model-00001-of-00002.safetensors"),
    ("no configuration", lambda s: (s / "config.json").unlink(), "fail", "without config.json"),
    ("still coming", lambda s: (s.parent.parent / "blobs/1f.0a1b2c3d.incomplete").touch(), "fail", "still being downloaded"),
    ("an index of another format", lambda s: (s / "consolidated.index.json").write_text('{"weight_map": {"a": "consolidated-00001.safetensors"}}'), "ok", ""),
    ("an index that lies", lambda s: (s / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "x\nengine alive.safetensors", "b": "$(touch CANARY).safetensors", "c": "-rf.safetensors", "d": "'; touch CANARY;'.safetensors"}})), "fail", "??touch?CANARY?.safetensors"),
    ("no weights at all", lambda s: [f.unlink() for f in s.glob("model*")], "fail", "without weights"),
)


@pytest.mark.parametrize("change,status,words", [w[1:] for w in WEIGHTS], ids=[w[0] for w in WEIGHTS])
def test_weights_are_complete_only_if_every_file_of_the_index_is_there(two, change, status, words):
    change(next((two.rig.spark("spark1") / "home/.cache/huggingface/hub/models--org--alpha/snapshots").iterdir()))
    got = two.swap("alpha", dry_run=True)
    assert check_of(got, "weights")[0] == status and words in check_of(got, "weights")[1], check_of(got, "weights")
    assert not list(two.rig.root.glob("**/CANARY"))


@pytest.mark.parametrize("uid,lingers,told,warns", [(1000, False, "b true", True), (1000, False, "b false", False), (1000, True, "b true", False), (0, False, "b true", False)])
def test_a_login_user_whose_shared_memory_systemd_removes_is_warned(tmp_path, uid, lingers, told, warns):
    for name, text in (("id", f'[ "$1" = -u ] && echo {uid} || echo me'), ("busctl", f"echo {told}"), ("timeout", 'shift; exec "$@"')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "me").touch() if lingers else None
    script = sc.SESSION_TRAP.replace("/var/lib/systemd/linger", str(tmp_path))
    got = subprocess.run(["sh", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, timeout=10)
    assert sc.parse_facts(got.stdout)[0]["removes_ipc"] == (["yes"] if warns else [])


def test_only_what_vllm_loads_counts_as_weights(two):
    snapshot = two.rig.weights("spark1", "org/alpha", size=3 << 20)
    (snapshot / "original").mkdir()
    for extra in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin"):
        (snapshot / extra).write_bytes(bytes(20 << 20))
    numbers = [c["numbers"] for c in two.swap("alpha", dry_run=True).json["checks"] if c["name"] == "memory"]
    facts, _ = sc.parse_facts(two.rig.sh("spark1", sc.facts_script(sc.ModelDef("a", "a", repo="org/alpha"), sc.Slot("main", ("spark1",), 1, "c", "t"), None, False)).stdout)
    assert 6 << 10 <= int(facts["weights_kb"][0]) < 7 << 10 and numbers[0]["weights"] == 0.0


def test_a_local_model_whose_path_leads_out_of_the_roots_is_refused(two, tmp_path):
    outside = Path("/var/tmp") / f"sparkctl-{os.getpid()}"
    shutil.copytree(two.rig.local, outside)
    try:
        shutil.rmtree(two.rig.local)
        two.rig.local.symlink_to(outside)
        status, detail, _ = check_of(two.swap("tuned", dry_run=True), "roots")
        assert status == "fail" and f"leads to {outside}, outside LOCAL_MODEL_ROOTS" in detail
    finally:
        shutil.rmtree(outside)


def meminfo(available_gb):
    return MEMINFO.replace("120000000", str(int(available_gb * (1 << 20))))


def test_a_launch_waits_until_the_memory_is_back_and_flat(two):
    rig, launched = two.rig, []
    assert two.swap("alpha").status == 200
    rig.control("spark1", "meminfo", meminfo(40))           # the old engine holds 60.8
    went = background(lambda: two.swap("beta"))
    two.phase("stopping")
    until(lambda: not rig.containers("spark1"))
    for gb in (45, 55, 64, 66, 70, 80, 90):                 # memory comes back slowly: it would fit from 64 on
        rig.control("spark1", "meminfo", meminfo(gb))
        until(lambda: f"spark1 has {gb}.0 GB" in two.running()["progress"]["text"], what=f"{gb} GB seen")
        launched.append(len(launches(rig)))
    assert went.result(60).status == 200 and set(launched) == {1}


def test_memory_that_does_not_come_back_fails_the_swap_before_the_launch_and_tells_who_holds_it(rig, looked_at, start, tmp_path):
    p = start(rig_env(rig, tmp_path, SWAP_STOP_TIMEOUT="3"), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    assert p.swap("alpha").status == 200
    rig.control("spark1", "meminfo", meminfo(40))
    rig._write_json(rig.spark("spark1") / "nvidia.json", {"apps": [[4242, 51200]]})
    got = p.swap("beta", rollback=False)
    code, message, remedy = errors_of(got.json)
    assert (got.status, code) == (502, "memory_not_released") and len(launches(rig)) == 1
    assert "spark1 has 40.0 GB available after the stop, and the model needs 60.8 GB; memory is held by processes on the GPU (50.0 GB)" in message and "stop processes on the GPU" in remedy
    assert [x["phase"] for x in got.json["phases"]][-2:] == ["stopping", "failed"]


@pytest.mark.parametrize("age,quiet,slower", [(160, 31, True), (160, 29, False), (140, 31, False)])
def test_a_load_is_called_slow_after_half_as_long_again_and_half_a_minute_without_a_line(tmp_path, age, quiet, slower):
    m = manager(tmp_path)
    with m._lock:
        m.recent = (sc.Swap("i", "main", "alpha", phase="ready", phases=(("loading", sc.utc(), 100.0), ("ready", sc.utc(), 0.0))),)
    m.start("main", "alpha")
    m._enter("checking")
    m._enter("draining")
    m._enter("stopping", touched=True)
    m._update(plan=PLAN)
    m._enter("launching")
    m._enter("loading")
    m._update(phase_began=time.time() - age)
    run = sc.SwapRun(m, m._config(), threading.Event())
    run.last_line = time.monotonic() - quiet
    run._tell_progress(time.monotonic())
    assert (m.book.running.slower, m.book.running.usual_seconds) == (slower, 100.0)


def test_a_new_models_load_is_estimated_from_the_size_of_what_was_loaded_before(tmp_path):
    m = manager(tmp_path)
    plan = sc.dataclasses.replace(PLAN, weights_gb=60)
    done = lambda model, seconds, **more: sc.Swap("i", "main", model, phase="ready", phases=(("loading", sc.utc(), seconds), ("ready", sc.utc(), 0.0)), plan=plan, **more)
    with m._lock:
        m.recent = (done("a", 60.0), done("a", 90.0), done("b", 120.0))
    assert m.durations("a")["loading"] == 75.0 and m.durations("new", 20)["loading"] == 30.0 and "loading" not in m.durations("new")


def launches(rig):
    return [c for c in rig.calls() if "launch-cluster.sh" in c["command"] and " exec " in c["command"] and c["from"] is None]


def test_a_solo_swap_ends_ready_and_serves_on_the_head_only(two):
    got = two.swap("alpha")
    assert (got.status, got.json["phase"]) == (200, "ready"), got.json["error"]
    assert [p["phase"] for p in got.json["phases"]] == ["queued", "checking", "draining", "stopping", "launching", "loading", "warming", "ready"]
    assert got.json["progress"]["fraction"] == 1.0
    [(pid, argv)] = two.rig.engines("spark1")
    assert argv[2:] == ["org/alpha", "--served-model-name", "alpha", "org/alpha", "gpt-4o", "--port", str(two.rig.port),
                        "--max-model-len", "4096", "--gpu-memory-utilization", "0.5"]
    assert two.rig.engines("spark2") == []
    slot = serves(two)
    assert (slot["state"], slot["model"], slot["served_id"]) == ("serving", "alpha", "alpha")
    assert [r["path"] for r in two.rig.requests("spark1")] == ["/v1/completions"]


def test_a_swap_replaces_the_model_and_keeps_the_old_engines_log(two):
    assert two.swap("alpha").status == 200
    second = two.swap("beta").json
    assert (second["phase"], second["from_model"]) == ("ready", "alpha")
    assert [a[2] for _, a in two.rig.engines("spark1")] == ["org/beta"]
    kept = (two.data / "swaps" / f"{second['id']}.engine.log").read_text()
    assert "Application startup complete" in kept and "org/alpha" in kept


def test_a_cluster_swap_runs_on_both_sparks_and_a_solo_one_after_it_leaves_no_worker(two):
    got = two.swap("wide")
    assert got.status == 200, got.json["error"]
    assert "--headless" in two.rig.engines("spark2")[0][1]
    assert "--tensor-parallel-size" in two.rig.engines("spark1")[0][1]
    assert two.swap("alpha").status == 200
    assert two.rig.containers("spark2") == []


def test_a_local_model_is_mounted_at_its_own_path(two):
    assert two.swap("tuned").status == 200
    assert f"{two.rig.local}:{two.rig.local}" in two.rig.container("spark1", "vllm_node")["volumes"]


def test_environment_and_verbatim_arguments_reach_the_engine_unchanged(two):
    assert two.swap("fancy").status == 200
    pid, argv = two.rig.engines("spark1")[0]
    assert argv[-2:] == ["--override-generation-config", '{"temperature": 1.0}'] or '{"temperature": 1.0}' in argv
    environ = dict(pair.partition("=")[::2] for pair in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    assert environ["SAY"] == "it's $HOME; `id`"


def test_unload_leaves_the_slot_empty(two):
    assert two.swap("alpha").status == 200
    got = two.post("/api/unload?wait=30").json
    assert (got["phase"], got["model"]) == ("ready", None)
    assert serves(two)["state"] == "empty" and two.rig.engines("spark1") == [] and two.rig.containers("spark1") == []


FAILURES = (    # name, behaviour of the engine, faults, settings, error code, words that must be told
    ("unknown flag", {"mode": "ok"}, {}, {}, "bad_flag", "unrecognized arguments: --no-such-flag 7"),
    ("weights missing for the engine", {"mode": "missing"}, {}, {}, "weights_missing", "the weights are not on the Spark"),
    ("out of memory", {"mode": "oom"}, {}, {}, "out_of_memory", "6.12 GiB more"),
    ("no room for the kv cache", {"mode": "kv"}, {}, {}, "out_of_memory", "no room for the KV cache"),
    ("memory taken by others", {"mode": "free_memory"}, {}, {}, "out_of_memory", "needs 109.52 of 121.69 GB, and 20.1 GB are free"),
    ("dies without a word in a container that stays up", {"mode": "die", "load": 0.6}, {}, {}, "engine_died", "exit code 1"),
    ("is killed", {"mode": "killed", "load": 0.6}, {}, {}, "out_of_memory", "exit 137"),
    ("says it is up and never answers", {"mode": "silent"}, {}, {"SWAP_ANSWER_TIMEOUT": "1"}, "not_answering", "does not answer from here"),
    ("never gets ready", {"mode": "never_ready"}, {}, {"SWAP_LOAD_TIMEOUT": "2"}, "load_timeout", "not ready after 2 s"),
    ("fails its first request", {"mode": "warm_fails"}, {}, {}, "warming_failed", "HTTP 500"),
    ("launcher exits non-zero", {"mode": "ok"}, {"launcher_exit": "3"}, {}, "launch_failed", "exit code 3: Error: something broke"),
    ("launcher hangs", {"mode": "ok"}, {"launcher_hangs": ""}, {"SWAP_LAUNCH_TIMEOUT": "1"}, "launch_timeout", "did not end within 1 s"),
    ("ended by the kernel", {"mode": "killed", "load": 0.6}, {"kernel": "audit: x\nVLLM::Worker invoked oom-killer: gfp_mask=0x1\n"}, {}, "out_of_memory", "its kernel ended a process"),
    ("image missing", {"mode": "ok"}, {"images": "something-else"}, {}, "image_missing", "vllm-node"),
)


@pytest.mark.parametrize("name,behaviour,faults,settings,code,words", FAILURES, ids=[f[0].replace(" ", "-") for f in FAILURES])
def test_a_failed_load_is_named_and_the_previous_model_comes_back(rig, start, tmp_path, name, behaviour, faults, settings, code, words):
    models = CATALOG.replace("LOCAL", str(rig.local)).replace("beta: {repo: org/beta, knobs: {", "beta: {repo: org/beta, knobs: {" + ("no-such-flag: 7, " if name == "unknown flag" else ""))
    env = rig_env(rig, tmp_path, **settings)
    (tmp_path / "models.yaml").write_text(models)
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    assert p.swap("alpha").status == 200
    rig.behave("spark1", "beta", **behaviour)
    for fault, value in faults.items():
        rig.control("spark1", fault, value)
    got = p.swap("beta", skip_checks=["image"])
    assert got.status == 502, got.json
    assert got.json["phase"] == "failed"
    assert errors_of(got.json)[0] == code and words in errors_of(got.json)[1], errors_of(got.json)
    assert errors_of(got.json)[2] and got.json["error"]["log_tail"]
    for fault in faults:
        rig.clear("spark1", fault)
    if faults:
        p.idle()            # with the fault still there the rollback may have failed with it; then a swap brings alpha back
        if serves(p)["model"] != "alpha":
            assert p.swap("alpha").status == 200
    newest = p.idle()[0]
    assert (newest["model"], newest["phase"]) == ("alpha", "ready")
    if not faults:
        assert newest["rollback_of"] == got.json["id"] and p.get(f"/api/swap/{got.json['id']}").json["rollback_id"] == newest["id"]
    assert [a[2] for _, a in rig.engines("spark1")] == ["org/alpha"]
    assert rig.containers("spark1") == ["vllm_node"]
    assert (p.data / "swaps" / f"{got.json['id']}.log").read_text()
    assert until(lambda: serves(p)["state"] == "serving")


def test_without_rollback_a_failed_swap_leaves_the_slot_empty(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="oom")
    assert two.swap("beta", rollback=False).status == 502
    assert [s["model"] for s in two.idle()] == ["beta", "alpha"]
    assert two.rig.engines("spark1") == [] and two.rig.containers("spark1") == []


def test_a_rollback_that_fails_ends_with_the_slot_empty_and_does_not_loop(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="oom")
    two.rig.behave("spark1", "alpha", mode="oom")
    assert two.swap("beta").status == 502
    recent = until(lambda: len(r := two.idle()) == 3 and r)
    assert [(s["model"], s["phase"], bool(s["rollback_of"])) for s in recent] == [("alpha", "failed", True), ("beta", "failed", False), ("alpha", "ready", False)]
    assert two.rig.engines("spark1") == []


def test_a_container_that_vanishes_while_loading_is_told_as_such(two):
    two.rig.behave("spark1", "alpha", mode="never_ready")
    swap = two.post("/api/swap", {"model": "alpha"}).json
    two.phase("loading")
    until(lambda: two.rig.engines("spark1"))
    two.rig.remove_container("spark1", "vllm_node")
    got = two.get(f"/api/swap/{swap['id']}?wait=10").json
    assert errors_of(got)[0] == "container_gone", got["error"]


def test_a_launcher_that_hangs_is_ended_with_its_swap(two):
    two.rig.control("spark1", "launcher_hangs")
    swap = two.post("/api/swap", {"model": "alpha"}).json
    two.phase("launching")
    until(lambda: launches(two.rig))
    assert two.call("DELETE", f"/api/swap/{swap['id']}").status == 202
    assert two.get(f"/api/swap/{swap['id']}?wait=20").json["phase"] == "cancelled"
    two.rig.clear("spark1", "launcher_hangs")
    assert two.swap("alpha").status == 200
    assert len(two.rig.engines("spark1")) == 1


def test_a_stop_that_hangs_fails_the_swap_before_the_launch_when_the_engine_will_not_go(rig, start, tmp_path):
    p = start(rig_env(rig, tmp_path, SWAP_STOP_TIMEOUT="4"), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    rig.behave("spark1", "alpha", mode="hang_term")
    assert p.swap("alpha").status == 200
    rig.control("spark1", "stop_hangs")
    got = p.swap("beta")
    rig.clear("spark1", "stop_hangs")
    assert got.status == 502 and errors_of(got.json)[0] == "stop_failed", got.json["error"]
    assert got.json["phases"][-2]["phase"] == "stopping" and not any("org/beta" in a for _, a in rig.engines("spark1"))
    p.idle()
    assert until(lambda: serves(p)["model"] == "alpha")


def test_a_launchers_stop_that_hangs_does_not_keep_an_ended_engine_in_the_way(rig, start, tmp_path):
    p = start(rig_env(rig, tmp_path, SWAP_STOP_TIMEOUT="6"), args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    assert p.swap("alpha").status == 200
    rig.control("spark1", "stop_hangs")
    got = p.swap("beta")
    assert got.status == 200, got.json["error"]


def test_a_strangers_process_on_the_port_stops_the_swap_before_anything_is_touched(two):
    two.rig.start_foreign("spark1", two.rig.port, "somebody/else")
    got = two.swap("alpha")
    assert got.status == 502 and errors_of(got.json)[0] == "check_failed"
    assert "somebody/else answers on port" in errors_of(got.json)[1]
    assert launches(two.rig) == []


def test_after_a_reconnect_only_lines_that_were_not_seen_are_taken():
    f = sc.Follower.__new__(sc.Follower)
    f.events, f._closed, f._since, f._seen_at, f._resumed, f._skip = sc.queue.Queue(), threading.Event(), "2026-11-23T10:00:00.000000000Z", 0, "", 0
    feed = lambda *lines: [f._line(f"2026-11-23T10:00:0{line[0]}.000000000Z {line}", True) for line in lines]
    feed("1 a", "1 b", "2 c", "2 d")
    f._resumed, f._skip = f._since, f._seen_at          # as a new connection does; docker's --since takes that moment in
    feed("1 b", "2 c", "2 d", "2 e", "3 f")
    assert [f.events.get_nowait()[1][2:] for _ in range(f.events.qsize())] == ["a", "b", "c", "d", "e", "f"]


def test_ssh_that_drops_while_loading_and_comes_back_does_not_fail_the_swap(two):
    two.rig.behave("spark1", "alpha", load=3)
    swap = two.post("/api/swap", {"model": "alpha"}).json
    two.phase("loading")
    until(lambda: two.rig.engines("spark1"))
    two.rig.control("spark1", "cut")
    until(lambda: "contact with spark1 lost" in (two.data / "swaps" / f"{swap['id']}.log").read_text())
    two.rig.clear("spark1", "cut")
    got = two.get(f"/api/swap/{swap['id']}?wait=30").json
    assert got["phase"] == "ready", got["error"]
    said = (two.data / "swaps" / f"{swap['id']}.log").read_text()
    assert "is back" in said and said.count("Starting to load model") == 1
    shards = [line.split(" ", 1)[1] for line in said.splitlines() if "checkpoint shards" in line]
    assert len(shards) == len(set(shards)) > 2, "lines seen before the drop came again"
    assert len(two.rig.engines("spark1")) == 1


@pytest.mark.parametrize("fault,words", [("down", "unreachable"), ("denied", "refused login"), ("hostkey", "unknown host key")])
def test_a_head_that_cannot_be_reached_stops_the_swap_and_says_why(two, fault, words):
    two.rig.control("spark1", fault)
    got = two.swap("alpha")
    assert got.status == 502 and errors_of(got.json)[0] == "check_failed"
    assert words in errors_of(got.json)[1] and errors_of(got.json)[2]
    assert launches(two.rig) == []


def test_a_spark_that_the_model_does_not_use_may_be_down(two):
    two.rig.control("spark2", "down")
    got = two.swap("alpha")
    assert got.status == 200, got.json["error"]
    assert [c["status"] for c in got.json["checks"] if c["name"] == "reachable"] == ["warn"]
    assert two.swap("wide").status == 502


def test_weights_that_are_not_on_every_spark_stop_the_swap_unless_the_check_is_skipped(two):
    shutil.rmtree(two.rig.spark("spark2") / "home/.cache/huggingface/hub/models--org--wide")
    got = two.swap("wide").json
    assert errors_of(got)[0] == "check_failed" and "org/wide is not on spark2" in errors_of(got)[1]
    assert two.swap("wide", skip_checks=["weights"]).status == 200


def test_a_model_that_does_not_fit_is_refused_with_the_knob_to_change(two):
    two.rig.control("spark1", "meminfo", MEMINFO.replace("120000000", "20000000"))
    got = two.swap("alpha").json
    assert errors_of(got)[0] == "check_failed" and "needs 60.8 GB" in errors_of(got)[1]
    assert "gpu-memory-utilization" in errors_of(got)[2]


def test_an_old_launcher_is_named_before_anything_is_touched(two):
    two.rig.install_launcher("spark1", LAUNCHER_JAN)
    got = two.swap("alpha").json
    assert errors_of(got)[0] == "check_failed" and "does not know" in errors_of(got)[1]


def test_a_dry_run_ends_planned_shows_the_commands_and_touches_nothing(two):
    got = two.swap("alpha", dry_run=True)
    assert (got.status, got.json["phase"]) == (200, "planned")
    assert any("exec vllm serve org/alpha" in c for c in got.json["commands"])
    assert launches(two.rig) == [] and two.rig.containers("spark1") == []


def test_a_foreign_engine_cannot_be_restored_and_that_is_said_beforehand(two):
    assert two.swap("alpha").status == 200
    rig_serve = f"cd spark-vllm-docker && ./launch-cluster.sh --solo stop && ./launch-cluster.sh --solo -d exec vllm serve org/other --port {two.rig.port}"
    assert two.rig.sh("spark1", rig_serve).returncode == 0
    until(lambda: serves(two)["served_id"] == "org/other")
    two.rig.behave("spark1", "beta", mode="oom")
    got = two.swap("beta").json
    assert any(c["name"] == "rollback" and "cannot be restored" in c["detail"] for c in got["checks"])
    assert got["phase"] == "failed" and [s["model"] for s in two.idle()] == ["beta", "alpha"]


@pytest.mark.parametrize("phase", ["checking", "stopping", "launching", "loading", "warming"])
def test_cancel_works_in_every_phase_and_leaves_no_half_started_engine(two, phase):
    assert two.swap("alpha").status == 200
    slow_down(two.rig, phase)
    swap = two.post("/api/swap", {"model": "beta"}).json
    two.phase(phase)
    assert two.call("DELETE", f"/api/swap/{swap['id']}").status == 202
    ended = two.get(f"/api/swap/{swap['id']}?wait=30").json
    assert ended["phase"] == "cancelled", ended
    speed_up(two.rig, phase)
    recent = two.idle()
    assert until(lambda: [a[2] for _, a in two.rig.engines("spark1")] == ["org/alpha"]), recent
    assert until(lambda: serves(two)["model"] == "alpha")
    assert (recent[0]["rollback_of"] == swap["id"]) == (phase != "checking")


def test_cancel_while_draining_serves_on(two):
    assert two.swap("alpha").status == 200
    with held_request(two):
        swap = two.post("/api/swap", {"model": "beta"}).json
        two.phase("draining")
        assert two.call("DELETE", f"/api/swap/{swap['id']}").status == 202
        assert two.get(f"/api/swap/{swap['id']}?wait=10").json["phase"] == "cancelled"
    assert two.post("/v1/completions", {"model": "alpha", "prompt": "x"}).status == 200


@contextlib.contextmanager
def held_request(program, seconds=3):
    """A streaming request in flight for about so many seconds."""
    program.rig.behave("spark1", "alpha", tokens=int(seconds * 20), token_delay=0.05)
    sock = socket.create_connection(("127.0.0.1", program.port))
    body = json.dumps({"model": "alpha", "stream": True, "messages": [{"role": "user", "content": "x"}]}).encode()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    assert sock.recv(100).startswith(b"HTTP/1.1 200")
    try:
        yield sock
    finally:
        sock.close()


def slow_down(rig, phase):
    """Make the next swap stay in phase until speed_up."""
    if phase == "checking":
        rig.control("spark1", "latency", "1.5")
    elif phase == "stopping":
        rig.control("spark1", "meminfo", MEMINFO.replace("120000000", "30000000"))
    elif phase == "launching":
        rig.control("spark1", "launcher_hangs")
    elif phase == "loading":
        rig.behave("spark1", "beta", load=4)
    else:
        rig.behave("spark1", "beta", mode="ok", load=0.2, warm_delay=30)


def speed_up(rig, phase):
    rig.clear("spark1", "latency", "launcher_hangs")
    rig.control("spark1", "meminfo", MEMINFO)
    rig.behave("spark1", "beta", mode="ok", load=0.3, warm_delay=0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill-9", "SIGTERM"])
@pytest.mark.parametrize("phase", ["checking", "draining", "stopping", "launching", "loading", "warming"])
def test_a_swap_survives_the_death_of_sparkctl_in_every_phase(two, phase, number):
    assert two.swap("alpha").status == 200
    before = len(launches(two.rig))
    with contextlib.ExitStack() as stack:
        if phase == "draining":
            stack.enter_context(held_request(two))
        else:
            slow_down(two.rig, phase)
        swap = two.post("/api/swap", {"model": "beta"}).json
        two.phase(phase)
        two.journaled(phase)
        if phase == "launching":
            until(lambda: len(launches(two.rig)) > before)
        assert two.kill(number) == (0 if number == signal.SIGTERM else -9)
    speed_up(two.rig, phase)
    two.start()
    if phase == "loading":              # requests are held as before, not refused
        assert two.post("/v1/completions", {"model": "beta", "prompt": "x"}).status == 200
    ended = two.get(f"/api/swap/{swap['id']}?wait=40").json
    assert ended["phase"] == "ready", ended["error"]
    assert [a[2] for _, a in two.rig.engines("spark1")] == ["org/beta"]
    log = (two.data / "swaps" / f"{swap['id']}.log").read_text()
    assert "started again while " + phase in log
    started = [c for c in two.rig.calls("spark1") if c["from"] is None and "launch-cluster.sh --solo --name vllm_node -d exec" in c["command"]]
    gates = two.rig.spark("spark1") / "home/.cache/sparkctl" / swap["id"]
    assert gates.is_dir() and started
    assert (gates / "out").read_text().count("Command dispatched") == 1
    assert two.get("/api/swap").json["recent"][-1]["model"] == "alpha"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_rollback_is_owed_even_if_sparkctl_dies_while_cleaning_up(two, number):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="never_ready")
    swap = two.post("/api/swap", {"model": "beta"}).json
    two.phase("loading")
    two.rig.control("spark1", "latency", "0.7")
    two.call("DELETE", f"/api/swap/{swap['id']}")
    until(lambda: json.loads((two.data / "swap.json").read_text())["running"]["ending"])
    two.kill(number)
    two.rig.clear("spark1", "latency")
    two.start()
    assert two.get(f"/api/swap/{swap['id']}?wait=30").json["phase"] == "cancelled"
    assert two.idle()[0]["rollback_of"] == swap["id"]
    assert [a[2] for _, a in two.rig.engines("spark1")] == ["org/alpha"]


def test_a_clean_up_that_our_own_end_cut_off_is_done_again_at_the_next_start(tmp_path):
    m = manager(tmp_path)
    swap = m.start("main", "alpha")
    m._update(save=True, touched=True, ending={"phase": "cancelled"})
    m._finish(types.SimpleNamespace(id=swap.id, clean_up=lambda s: m._closing.set(), close=lambda: None, log=m.log_of(swap.id)))
    assert manager(tmp_path).book.running.ending == {"phase": "cancelled"}
    done = []
    m._drive = types.MethodType(sc.SwapManager._drive, m)
    m._finish = lambda run: (done.append(run), 1 / 0)
    m._drive()
    assert not done                             # nor is it tried again while we end


def test_a_head_that_ssh_cannot_reach_is_not_told_as_a_launcher_that_hangs():
    for code, told in ((255, "unreachable"), (-1, "launch_timeout")):
        run = types.SimpleNamespace(config=types.SimpleNamespace(settings={"SWAP_LAUNCH_TIMEOUT": 5.0}, sparks={"spark1": sc.Spark("spark1", "host1")}), left=lambda limit: 0.0, hidden=(),
                                    on=lambda *asked: sc.Result("time_out", code, "", "ssh: connect to host host1 port 22: Connection timed out"), log=types.SimpleNamespace(add=lambda line: None))
        with pytest.raises(sc.Failed) as failed:
            sc.SwapRun.do_launching(run, types.SimpleNamespace(id="x", plan=types.SimpleNamespace(hosts=("spark1",), launch="true")))
        assert failed.value.code == told and failed.value.remedy


def test_a_slot_that_left_the_files_during_its_swap_is_published_to_nobody(two):
    two.rig.behave("spark1", "alpha", load=3)
    swap = two.post("/api/swap", {"model": "alpha"}).json
    two.phase("loading")
    Path(two.dir / "services.yaml").write_text(f"slots: {{other: {{hosts: [spark2], port: {two.rig.port}, container: other}}}}")
    until(lambda: [s["name"] for s in two.get("/api/state").json["slots"]] == ["other"])
    assert two.get(f"/api/swap/{swap['id']}?wait=30").json["phase"] == "ready"
    assert two.get("/v1/models").json["data"] == []


def test_what_a_model_kept_secret_when_it_was_launched_is_hidden_though_the_catalog_changed_since(tmp_path, monkeypatch):
    m, asked = manager(tmp_path), []
    swap = m.start("main", "alpha")
    m._update(plan=sc.Plan("main", "alpha", ("alpha",), ("spark1",), 1, "c", "template", "", "", "stop", "", "", hidden=("old s3cret", "120")))

    def run_(host, script, timeout_s, cancel):
        asked.append(script)
        return sc.Result("failed", 1, "available 1200000\n", "TOKEN=old\\ s3cret is old s3cret")
    m.hosts = types.SimpleNamespace(run=run_, each=lambda hosts, job: {host: job(host) for host in hosts}, address=lambda name: "127.0.0.1")
    monkeypatch.setattr(sc, "probe_vllm_endpoint", lambda endpoint, timeout_s: sc.Probe("silent"))
    run = sc.SwapRun(m, m._config(), threading.Event())
    assert run.on("spark1", "x", 1).out == "available 1200000\n"         # what is read is not touched
    run.stop_engine(m.book.running.plan, ("spark1",))
    run._heard("engine: old s3cret")
    assert asked[-1] == "stop" and m.log_of(swap.id).tail() == ["spark1: the template's stop ended with 1: TOKEN=*** is ***", "engine: ***"]


def test_a_log_on_disk_ends_at_its_bytes_whatever_it_is_written_in(tmp_path, monkeypatch):
    monkeypatch.setattr(sc.SwapLog, "DISK", 5000)
    swap_log = sc.SwapLog(tmp_path / "x.log")
    for _ in range(100):
        swap_log.add("日" * 100)
    assert 4600 < os.path.getsize(tmp_path / "x.log") <= 5000 and len(swap_log.tail(200)) == 100


def test_of_a_history_only_the_last_files_stay_on_disk(tmp_path):
    (tmp_path / "swaps").mkdir()
    names = [f"2020-{n:03d}" for n in range(110)]
    for name in names:
        for suffix in (".json", ".log", ".engine.log"):
            (tmp_path / "swaps" / (name + suffix)).write_text("{}")
    m = manager(tmp_path)
    assert sorted(os.listdir(tmp_path / "swaps")) == [name + ".json" for name in names[-100:]] and len(m.warnings) == 100


def test_with_no_journal_what_the_slot_really_serves_is_adopted(two):
    assert two.swap("alpha").status == 200
    two.kill()
    shutil.rmtree(two.data)
    two.start()
    slot = until(lambda: (s := serves(two))["state"] == "serving" and s)
    assert slot["model"] == "alpha"


def test_a_model_that_changed_without_us_is_told_within_a_poll(two):
    assert two.swap("alpha").status == 200
    two.rig.kill_engine("spark1")
    until(lambda: serves(two)["state"] == "empty")
    assert any(e["kind"] == "model_lost" and "alpha" in e["text"] for e in two.get("/api/events").json["events"])
    assert not any(e["kind"] in ("model_lost", "model_changed") for e in two.get("/api/events").json["events"][1:])


def test_of_fifty_simultaneous_swaps_exactly_one_starts_and_the_others_are_told_which(two):
    two.rig.behave("spark1", "alpha", load=2)
    gate = threading.Barrier(50)

    def ask(_):
        gate.wait()
        return two.post("/api/swap", {"model": "alpha"})
    with concurrent.futures.ThreadPoolExecutor(50) as pool:
        got = list(pool.map(ask, range(50)))
    won = [g for g in got if g.status == 202]
    lost = [g for g in got if g.status == 409]
    assert (len(won), len(lost)) == (1, 49)
    assert {g.json["error"]["swap"] for g in lost} == {won[0].json["id"]} and {g.code for g in lost} == {"swap_running"}
    assert won[0].headers["Location"] == f"/api/swap/{won[0].json['id']}"
    two.idle()
    assert len(launches(two.rig)) == 1


def test_a_new_swap_preempts_a_running_rollback(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="oom")
    two.rig.behave("spark1", "alpha", mode="ok", load=20)
    assert two.swap("beta").status == 502
    until(lambda: (s := two.running()) and s["rollback_of"] and s["phase"] == "loading")
    two.rig.behave("spark1", "alpha", load=0.2)
    got = two.swap("fancy")
    assert (got.status, got.json["phase"]) == (200, "ready")
    assert [s["phase"] for s in two.idle()] == ["ready", "cancelled", "failed", "ready"]
    assert [a[2] for _, a in two.rig.engines("spark1")] == ["org/fancy"]


def test_the_eta_comes_from_earlier_swaps_of_the_same_model(two):
    assert two.swap("alpha").status == 200
    assert two.swap("beta").status == 200
    two.rig.behave("spark1", "alpha", load=2)
    swap = two.post("/api/swap", {"model": "alpha"}).json
    loading = until(lambda: (s := two.running()) and s["phase"] == "loading" and s["eta_seconds"] is not None and s)
    assert 0 < loading["usual_seconds"] < 2 and 0 <= loading["eta_seconds"] < 60
    assert two.get(f"/api/swap/{swap['id']}?wait=20").json["phase"] == "ready"


def test_requests_during_a_swap_are_held_and_then_answered_by_the_new_model(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", load=0.6)
    two.post("/api/swap", {"model": "beta"})
    two.phase("loading")
    got = two.post("/v1/chat/completions", {"model": "beta", "messages": [{"role": "user", "content": "held"}]})
    assert got.status == 200 and got.json["model"] == "beta"
    assert two.get("/api/swap").json["running"] is None


def test_requests_for_the_outgoing_model_are_told_at_once(two):
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="never_ready")
    swap = two.post("/api/swap", {"model": "beta"}).json
    two.phase("loading")
    assert two.get("/v1/models").json["data"] == [] and not any(m["serving_on"] for m in two.get("/api/models").json["models"])
    got = two.post("/v1/completions", {"model": "gpt-4o", "prompt": "x"})
    assert (got.status, got.code) == (503, "model_leaving") and int(got.headers["Retry-After"]) > 0
    two.call("DELETE", f"/api/swap/{swap['id']}")
    two.idle()
    assert two.post("/v1/completions", {"model": "gpt-4o", "prompt": "x"}).status == 200


def rolling_back(two):
    """alpha served, beta failed, and alpha's rollback is loading slowly -> the failed swap's id."""
    assert two.swap("alpha").status == 200
    two.rig.behave("spark1", "beta", mode="oom")
    two.rig.behave("spark1", "alpha", mode="ok", load=20)
    failed = two.swap("beta").json
    until(lambda: (s := two.running()) and s["rollback_of"] and s["phase"] == "loading")
    two.rig.behave("spark1", "alpha", load=0.2)
    return failed["id"]


def test_a_swap_that_preempts_a_rollback_and_fails_its_checks_gives_the_rollback_back(two):
    failed = rolling_back(two)
    shutil.rmtree(two.rig.spark("spark1") / "home/.cache/huggingface/hub/models--org--fancy")
    assert two.swap("fancy").status == 502
    newest = two.idle()[0]
    assert (newest["model"], newest["phase"], bool(newest["rollback_of"])) == ("alpha", "ready", True) and newest["rollback_of"] != failed
    assert two.post("/v1/completions", {"prompt": "x"}).json["model"] == "alpha"


def test_a_rollback_gives_way_only_to_a_swap_of_its_own_slot(rig, start, tmp_path):
    env = rig_env(rig, tmp_path)
    (tmp_path / "services.yaml").write_text(f"slots: {{main: {{hosts: [spark1], port: {rig.port}}}, second: {{hosts: [spark2], port: {rig.free_port('spark2')}, container: other}}}}")
    p = start(env, args=("--models", str(tmp_path / "models.yaml"), "--services", str(tmp_path / "services.yaml")))
    p.rig = rig
    rolling_back(p)
    got = p.post("/api/swap", {"model": "alpha", "slot": "second"})
    assert (got.status, got.code) == (409, "swap_running")
    p.call("DELETE", f"/api/swap/{p.running()['id']}")
    p.idle()
    assert p.get("/api/state").json["slots"][0]["state"] == "empty"
    assert p.post("/v1/completions", {"prompt": "x"}, timeout=5).code == "nothing_served"      # no longer held


def test_a_journal_that_cannot_be_written_refuses_the_swap_and_changes_nothing(two):
    (two.data / "swap.json").mkdir()
    got = two.post("/api/swap", {"model": "alpha"})
    assert (got.status, got.code) == (503, "journal_unwritable")
    assert two.get("/api/swap").json == {"running": None, "recent": []} and launches(two.rig) == []
    (two.data / "swap.json").rmdir()
    assert two.swap("alpha").status == 200


def test_a_journal_that_cannot_be_written_later_on_stops_the_swap_before_the_old_engine(two):
    assert two.swap("alpha").status == 200
    with held_request(two):
        swap = two.post("/api/swap", {"model": "beta"}).json
        two.journaled("draining")
        (two.data / "swap.json").unlink()
        (two.data / "swap.json").mkdir()
    ended = two.get(f"/api/swap/{swap['id']}?wait=20").json
    assert errors_of(ended)[0] == "journal_unwritable"
    (two.data / "swap.json").rmdir()
    assert [s["model"] for s in two.idle()] == ["beta", "alpha"] and two.post("/v1/completions", {"model": "alpha", "prompt": "x"}).status == 200


def test_what_was_launched_is_stopped_where_it_was_launched_though_the_slot_was_changed_since(two):
    assert two.swap("alpha").status == 200
    Path(two.dir / "services.yaml").write_text(f"slots: {{main: {{hosts: [spark1, spark2], port: {two.rig.port}, container: renamed}}}}")
    until(lambda: any(e["kind"] == "config_changed" for e in two.get("/api/events").json["events"]))
    assert two.swap("beta").status == 200
    assert two.rig.containers("spark1") == ["renamed"]


def test_dry_runs_do_not_push_real_swaps_out_of_the_history(two):
    kept = two.swap("alpha").json["id"]
    for _ in range(15):
        assert two.swap("beta", dry_run=True).status == 200
    recent = two.get("/api/swap").json["recent"]
    assert recent[-1]["id"] == kept and len(recent) == 1 + sc.SwapManager.KEEP_DRY
    two.journaled(None)                 # else the last one is resumed
    two.restart()
    assert [s["id"] for s in two.get("/api/swap").json["recent"]] == [kept]
    assert sorted(os.listdir(two.data / "swaps")) == [kept + ".json", kept + ".log"]


def test_foreign_files_among_the_state_are_reported_and_never_stop_the_start(two):
    kept = two.swap("alpha").json["id"]
    two.journaled(None)
    two.kill()
    record = json.loads((two.data / "swaps" / f"{kept}.json").read_text())
    for i, change in enumerate(({"ended_at": 5}, {"fraction": "x"}, {"phases": [["queued", "x"]]}, {"phases": [["queued", "x", "soon"]]}, {"model": 7})):
        (two.data / "swaps" / f"20200101-00000{i}-aaaa.json").write_text(json.dumps({**record, "id": f"2020{i}", **change}))
    (two.data / "swaps" / "20200101-000009-aaaa.json").write_text("[" * 100000)
    with open(two.data / "events.jsonl", "a") as f:
        f.write('{"n": "x"}\n{"n": null}\n{"n": 1, "text": "\\ud800", "at": "", "kind": "k"}\n' + "[" * 100000 + '\n{"n": 9')
    two.start()
    assert [s["id"] for s in two.get("/api/swap").json["recent"]] == [kept]
    state = two.get("/api/state")
    assert state.status == 200 and sum("is of another shape" in w for w in state.json["warnings"]) >= 5
    assert two.swap("beta").status == 200


@pytest.mark.parametrize("content", ["{", "[]", '{"running": 5}', '{"running": {"id": "x", "slot": "main", "model": "m", "phase": "loading"}}', '{"slots": {"main": 7}}', '{"slots": []}'])
def test_a_foreign_journal_is_set_aside_and_what_is_served_is_adopted(two, content):
    assert two.swap("alpha").status == 200
    two.kill()
    (two.data / "swap.json").write_text(content)
    two.start()
    assert until(lambda: serves(two)["model"] == "alpha") and two.running() is None
    assert any("swap.json" in w for w in two.get("/api/state").json["warnings"])



# === the rig =================================================================
# Stand-ins for Sparks: ssh, docker, the launcher and vLLM, each with the faults a test may want.

# @PYTHON@ and @ROOT@ are filled in by Rig: the programs must not depend on the caller's environment.
SSH = r'''#!@PYTHON@ -SE
# Stand-in for the OpenSSH client and the sshd behind it.
import json, os, select, sys, time
ROOT = "@ROOT@"
FLAGS = "46AaCfGgKkMNnqsTtVvXxYy"

def die(text, code=255):
    sys.stderr.write(text + "\r\n")
    sys.stderr.flush()
    os._exit(code)

def parse(argv):
    opts, flags, values, words, i = {}, "", {}, [], 0
    while i < len(argv):
        a = argv[i]
        i += 1
        if a == "--":
            words += argv[i:]
            break
        if not a.startswith("-") or a == "-":
            words.append(a)
            if len(words) == 1:     # like getopt in ssh: options may follow the destination, not the command
                if i < len(argv) and argv[i].startswith("-"):
                    continue
                words += argv[i:]
                break
            words += argv[i:]
            break
        a = a[1:]
        while a:
            letter, a = a[0], a[1:]
            if letter in FLAGS:
                flags += letter
                continue
            if letter not in "BbcDEeFIiJLlmOoPpQRSWw":
                die("unknown option -- %s\nusage: ssh [options] destination [command [argument ...]]" % letter)
            if not a:
                if i >= len(argv):
                    die("ssh: option requires an argument -- %s" % letter)
                a, i = argv[i], i + 1
            if letter == "o":
                key, _, value = a.replace("=", " ", 1).strip().partition(" ")
                opts.setdefault(key.lower(), value.strip())
            else:
                values[letter] = a
            a = ""
    return opts, flags, values, words

def main():
    opts, flags, values, words = parse(sys.argv[1:])
    if "V" in flags:
        die("OpenSSH_9.6p1 Ubuntu-3ubuntu13, OpenSSL 3.0.13 30 Jan 2024", 0)
    if not words:
        die("usage: ssh [options] destination [command [argument ...]]")
    user, _, host = words[0].rpartition("@")
    if host.startswith("ssh://"):
        host = host[6:]
    user = values.get("l") or user or opts.get("user") or os.environ.get("USER") or "root"
    port = values.get("p") or opts.get("port") or "22"
    command = " ".join(words[1:])
    sparks = json.load(open(ROOT + "/sparks.json"))
    name = next((n for n, a in sparks.items() if host in (n, a)), None)
    address = sparks.get(name, host)
    record = {"time": time.time(), "pid": os.getpid(), "host": host, "spark": name, "user": user, "argv": sys.argv[1:],
              "command": command, "from": os.environ.get("RIG_SPARK")}
    log = os.open(ROOT + "/ssh.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(log, json.dumps(record).encode() + b"\n")
    os.close(log)
    if "G" in flags:
        sys.stdout.write("user %s\nhostname %s\nport %s\n" % (user, address, port))
        return 0
    if "O" in values:
        said = {"check": "Master running (pid=%d)" % os.getpid(), "exit": "Exit request sent.", "stop": "Stop listening request sent."}
        die(said.get(values["O"], "Invalid multiplex command."), 0 if values["O"] in said else 255)
    if name is None:
        die("ssh: Could not resolve hostname %s: Name or service not known" % host)
    home = ROOT + "/sparks/" + name
    exists = os.path.exists

    def refused():
        die("ssh: connect to host %s port %s: Connection refused" % (host, port))

    if exists(home + "/latency"):
        time.sleep(float(open(home + "/latency").read() or 0.1))
    if exists(home + "/down") or exists(home + "/cut"):
        refused()
    if exists(home + "/timeout"):
        limit = min(float(opts.get("connecttimeout", 30) or 30), 30)
        until = time.monotonic() + limit
        while time.monotonic() < until and exists(ROOT):
            time.sleep(0.02)
        die("ssh: connect to host %s port %s: Connection timed out" % (host, port))
    if exists(home + "/hostkey"):
        die("Host key verification failed.")
    if exists(home + "/denied"):
        die("%s@%s: Permission denied (publickey,password)." % (user, host))
    alive = float(opts.get("serveraliveinterval", 0) or 0) * float(opts.get("serveralivecountmax", 3) or 3)

    def frozen():
        # Nothing comes through; only a keep-alive, if asked for, may end it.
        since = time.monotonic()
        while exists(home + "/freeze"):
            if not exists(ROOT):
                os._exit(255)
            if exists(home + "/cut"):
                die("client_loop: send disconnect: Broken pipe")
            if alive and time.monotonic() - since > alive:
                die("Timeout, server %s not responding." % address)
            time.sleep(0.02)

    frozen()
    if "N" in flags:
        if "f" in flags and os.fork():
            os._exit(0)
        while exists(ROOT) and not exists(home + "/cut"):
            frozen()
            time.sleep(0.05)
        die("client_loop: send disconnect: Broken pipe")
    if "@gpu" in command and "clock %s" not in command and exists(home + "/glance"):
        # a poll costs a dozen processes; where a test is not about what it tells, it tells of memory only
        sys.stdout.write("".join("/proc/meminfo:" + line for line in open(home + "/meminfo")) + "@gpu\n@apps\n@groups\n@docker\n@df\n@end\n")
        return 0

    env = {"HOME": home + "/home", "USER": user, "LOGNAME": user, "SHELL": "/bin/sh", "LANG": "C.UTF-8",
           "PATH": home + "/bin:/usr/bin:/bin", "RIG_ROOT": ROOT, "RIG_SPARK": name, "SPARK_ADDRESS": address,
           "SSH_CONNECTION": "127.0.0.1 50000 %s 22" % address}
    in_r, in_w = os.pipe()
    out_r, out_w = os.pipe()
    err_r, err_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()     # as sshd does: the death of the client is not the death of the command
            import _signal
            _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)     # Python ignores it and children would inherit that
            os.dup2(in_r, 0)
            os.dup2(out_w, 1)
            os.dup2(err_w, 2)
            os.closerange(3, 256)
            os.chdir(env["HOME"])
            command = command.replace("/proc/meminfo", home + "/meminfo")       # each Spark has memory and sensors of its own
            for path in ("/proc/pressure", "/proc/loadavg", "/proc/uptime", "/proc/$p", "/sys/"):
                command = command.replace(path, home + path)
            os.execve("/bin/sh", ["sh", "-c", command] if command else ["sh"], env)
        finally:
            os._exit(127)
    for fd in (in_r, out_w, err_w):
        os.close(fd)
    if "f" in flags and os.fork():
        os._exit(0)
    os.set_blocking(in_w, False)
    child = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(out_r, select.POLLIN)
    poll.register(err_r, select.POLLIN)
    poll.register(child, select.POLLIN)
    outputs, pending, status, eof = {out_r: 1, err_r: 2}, b"", None, False
    reading = "n" not in flags and "f" not in flags
    try:
        os.fstat(0)
    except OSError:
        reading = False
    if reading:
        poll.register(0, select.POLLIN)
    else:
        eof = True
    writing = False

    def stop_input():
        nonlocal in_w, writing
        if in_w is not None:
            if writing:
                poll.unregister(in_w)
                writing = False
            os.close(in_w)
            in_w = None

    def feed():
        nonlocal pending, writing
        try:
            while pending:
                n = os.write(in_w, pending)
                pending = pending[n:]
        except BlockingIOError:
            if not writing:
                poll.register(in_w, select.POLLOUT)
                writing = True
            return
        except OSError:
            pending = b""
            stop_input()
            return
        if writing:
            poll.unregister(in_w)
            writing = False
        if eof:
            stop_input()

    if eof:
        stop_input()
    while outputs or status is None:    # like sshd: not over before the pipes are closed AND the command has ended
        if exists(home + "/cut"):
            die("client_loop: send disconnect: Broken pipe")
        if exists(home + "/freeze"):
            frozen()
        for fd, what in poll.poll(50):
            if fd in outputs:
                data = os.read(fd, 65536)
                if not data:
                    poll.unregister(fd)
                    os.close(fd)
                    del outputs[fd]
                    continue
                try:
                    while data:
                        data = data[os.write(outputs[fd], data):]
                except OSError:
                    os._exit(255)
            elif fd == child:
                status = os.waitpid(pid, 0)[1]
                poll.unregister(child)
            elif fd == 0:
                if in_w is None:
                    poll.unregister(0)
                elif len(pending) < 1 << 20:
                    data = os.read(0, 65536)
                    if not data:
                        eof = True
                        poll.unregister(0)
                    pending += data
                    feed()
                elif not writing:
                    feed()
            elif fd == in_w:
                feed()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 255

try:
    code = main()
    sys.stdout.flush()
    os._exit(code)
except KeyboardInterrupt:
    os._exit(255)
'''

DOCKER = r'''#!@PYTHON@ -SE
# Stand-in for docker on one Spark. No daemon: state is files, each background command has a "__shim" process.
import json, os, sys, time
ROOT = "@ROOT@"
SELF = os.path.abspath(__file__)
SPARK = os.path.dirname(os.path.dirname(SELF))
STATE = SPARK + "/docker"
HEX = "0123456789abcdef"

def control(name):
    if os.environ.get("RIG_FORCE"):
        return None     # the rig itself gets through whatever fault is set
    try:
        with open(SPARK + "/" + name) as f:
            return f.read()
    except OSError:
        return None

def fail(text, code=1):
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
    os._exit(code)

def block(name):
    while control(name) is not None and os.path.exists(ROOT):
        time.sleep(0.02)

def new_id():
    return os.urandom(32).hex()

def stamp(ns=None):
    ns = time.time_ns() if ns is None else ns
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9)) + ".%09dZ" % (ns % 10**9)

def moment(text):
    # RFC 3339, unix seconds with a fraction, or a duration like 10m: nanoseconds
    if "T" in text:
        import calendar
        date, _, clock = text.partition("T")
        shift, sign = "", 0
        if clock.endswith("Z"):
            clock = clock[:-1]
        elif "+" in clock:
            clock, _, shift = clock.partition("+")
            sign = 1
        elif "-" in clock:
            clock, _, shift = clock.partition("-")
            sign = -1
        clock, _, fraction = clock.partition(".")
        y, mo, d = map(int, date.split("-"))
        h, mi, s = (list(map(int, clock.split(":"))) + [0, 0])[:3]
        ns = calendar.timegm((y, mo, d, h, mi, s)) * 10**9 + int((fraction + "0" * 9)[:9])
        if shift:
            sh, _, sm = shift.partition(":")
            ns -= sign * (int(sh) * 3600 + int(sm or 0) * 60) * 10**9
        return ns
    if text[-1:] in "smh":
        total, number = 0.0, ""
        for c in text:
            if c in "smh":
                total += float(number) * {"s": 1, "m": 60, "h": 3600}[c]
                number = ""
            else:
                number += c
        return time.time_ns() - int(total * 1e9)
    whole, _, fraction = text.partition(".")
    return int(whole) * 10**9 + int((fraction + "0" * 9)[:9])

def when(option, text):
    try:
        return moment(text)
    except (ValueError, IndexError, KeyError):
        fail('invalid value for "%s": failed to parse value as time or duration: "%s"' % (option, text))

# --- processes: every one of a container carries RIG_CONTAINER in its environment

def having(mark):
    mark, found = b"\0" + mark.encode() + b"\0", []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/environ", "rb") as f:
                    if mark in b"\0" + f.read():
                        found.append(int(name))
            except OSError:
                pass
    return sorted(found)

def processes(meta):
    return having("RIG_CONTAINER=" + meta["id"])

def cmdline(pid):
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as f:
            return f.read().decode("utf-8", "replace").rstrip("\0").split("\0")
    except OSError:
        return []

def sync(cdir, meta):
    # <container>/proc holds only this container's processes, as links to the real thing, so they vanish by themselves.
    for pid in processes(meta):
        try:
            os.symlink("/proc/%d" % pid, "%s/proc/%d" % (cdir, pid))
        except OSError:
            pass
    try:
        for name in os.listdir(cdir + "/proc"):
            if name.isdigit() and not os.path.exists(cdir + "/proc/" + name):
                os.unlink(cdir + "/proc/" + name)
    except OSError:
        pass

def slay(meta, first=9):
    import signal
    for _ in range(200):
        alive = processes(meta)
        if not alive:
            return
        for pid in alive:
            try:
                os.kill(pid, first)
            except OSError:
                pass
        time.sleep(0.01)

# --- containers

def load(cdir):
    try:
        with open(cdir + "/meta.json") as f:
            meta = json.load(f)
    except (OSError, ValueError):
        return None
    try:
        with open(cdir + "/exited") as f:
            meta["exit"] = int(f.read() or 0)
        meta["running"] = False
    except OSError:
        meta["exit"], meta["running"] = 0, True
    return meta

def containers():
    found = []
    for name in sorted(os.listdir(STATE)):
        if not name.startswith("."):
            meta = load(STATE + "/" + name)
            if meta:
                found.append((STATE + "/" + name, meta))
    return found

def find(name):
    name = name.lstrip("/")
    if name and "/" not in name:
        meta = load(STATE + "/" + name)
        if meta:
            return STATE + "/" + name, meta
    if len(name) >= 4 and all(c in HEX for c in name):
        for cdir, meta in containers():
            if meta["id"].startswith(name):
                return cdir, meta
    return None, None

def need(name, running=False):
    cdir, meta = find(name)
    if not meta:
        fail("Error response from daemon: No such container: " + name)
    if running and not meta["running"]:
        fail("Error response from daemon: container %s is not running" % meta["id"])
    return cdir, meta

def event(meta, action, **more):
    line = dict(more, time=time.time_ns(), action=action, name=meta["name"], id=meta["id"], image=meta["image"])
    fd = os.open(SPARK + "/docker.events", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(line).encode() + b"\n")
    os.close(fd)

def remove(cdir, meta):
    gone = STATE + "/.gone-" + meta["id"]
    try:
        os.rename(cdir, gone)       # first the name, at once; then the files
    except OSError:
        return
    event(meta, "destroy")
    import shutil
    shutil.rmtree(gone, ignore_errors=True)

def ended(cdir, meta, code):
    slay(meta)
    event(meta, "die", exitCode=str(code))
    if meta["rm"]:
        remove(cdir, meta)
        return
    try:
        with open(cdir + "/.exited", "w") as f:
            f.write(str(code))
        os.rename(cdir + "/.exited", cdir + "/exited")
    except OSError:
        pass

def path_of(program, env):
    for folder in [""] if "/" in program else env.get("PATH", "/usr/bin:/bin").split(":"):
        full = folder + "/" + program if folder else program
        if os.path.isfile(full) and os.access(full, os.X_OK):
            return full
    return None

def surroundings(meta, extra=()):
    keep = ("HOME", "PATH", "LANG", "USER", "RIG_ROOT", "RIG_SPARK", "SPARK_ADDRESS")
    env = {k: os.environ[k] for k in keep if k in os.environ}
    for item in list(meta["env"]) + list(extra):
        key, _, value = item.partition("=")
        if key not in ("PATH", "RIG_ROOT", "RIG_SPARK"):
            env[key] = value
    env["HOSTNAME"] = meta["id"][:12]
    env["RIG_CONTAINER"] = meta["id"]
    return env

def default_sigpipe():
    import _signal
    _signal.signal(_signal.SIGPIPE, _signal.SIG_DFL)    # Python ignores it and children would inherit that

def background(cdir, meta, full, argv, env, cwd, main=False):
    # A process forks the command, then turns into the shim: so it is the parent that sees the exit code.
    r, w = os.pipe()
    told, tell = os.pipe()
    exec_id = new_id()
    shim = os.fork()
    if shim == 0:
        try:
            os.setsid()
            child = os.fork()
            if child == 0:
                try:
                    os.setsid()
                    os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                    default_sigpipe()
                    os.dup2(w, 1)
                    os.dup2(w, 2)
                    os.closerange(3, 256)
                    os.chdir(cwd)
                    os.execve(full, argv, env)
                finally:
                    os._exit(126)
            with open(cdir + "/execs/" + exec_id, "w") as f:
                f.write("main" if main else str(child))
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.dup2(r, 200)                 # by way of high numbers: either may be 3 or 4 already
            os.dup2(tell, 201)
            os.dup2(200, 3)
            os.dup2(201, 4, inheritable=False)      # closes on exec: that is the message "started"
            os.closerange(5, 256)
            os.execv(SELF, ["docker", "__shim", cdir, exec_id, str(child), "main" if main else "exec"])
        finally:
            os._exit(125)
    os.close(w)
    os.close(tell)
    os.read(told, 1)
    return exec_id

def shim(cdir, exec_id, pid, kind):
    import select
    meta, pid = load(cdir), int(pid)
    if not meta:
        os._exit(1)
    try:
        log = os.open(cdir + "/log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError:
        log = os.open("/dev/null", os.O_WRONLY)
    child, poll, rest, code, opened = os.pidfd_open(pid), select.poll(), b"", None, True
    poll.register(3, select.POLLIN)
    poll.register(child, select.POLLIN)

    def take():
        nonlocal rest, opened
        data = os.read(3, 65536)
        if not data:
            opened = False
            poll.unregister(3)
            data = b"\n" if rest else b""
        lines = (rest + data).split(b"\n")
        rest = lines.pop()
        if lines:
            mark = stamp().encode() + b" "
            os.write(log, b"".join(mark + line + b"\n" for line in lines))

    while opened or code is None:
        ready = dict(poll.poll())
        if 3 in ready:
            take()
        elif child in ready:        # only when the pipe is drained: the last words come before the end
            status = os.waitpid(pid, 0)[1]
            code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)
            poll.unregister(child)
            try:
                os.unlink(cdir + "/execs/" + exec_id)
            except OSError:
                pass
            if kind == "main":
                now = load(cdir)
                if now and now["id"] == meta["id"] and now["running"]:
                    ended(cdir, meta, code)
                break
            event(meta, "exec_die", execID=exec_id, exitCode=str(code))
    os._exit(0)

def foreground(cdir, meta, full, argv, env, cwd, keep_stdin):
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()     # the death of the docker client does not reach into the container
            default_sigpipe()
            if not keep_stdin:
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.closerange(3, 256)
            os.chdir(cwd)
            os.execve(full, argv, env)
        finally:
            os._exit(126)
    return pid

def wait_for(cdir, meta, pid):
    import select
    poll = select.poll()
    poll.register(os.pidfd_open(pid), select.POLLIN)
    pause = 5
    while not poll.poll(pause):     # newcomers must show up in the container's /proc
        sync(cdir, meta)
        pause = 50
    status = os.waitpid(pid, 0)[1]
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)

# --- options

def options(argv, valued, flags):
    # leading options only; returns [(name, value)], rest
    found, i = [], 0
    while i < len(argv):
        a = argv[i]
        if a == "--":
            return found, argv[i + 1:]
        if not a.startswith("-") or a == "-":
            break
        i += 1
        if a.startswith("--"):
            name, eq, value = a.partition("=")
            if name in valued:
                if not eq:
                    if i >= len(argv):
                        fail("flag needs an argument: " + name, 125)
                    value, i = argv[i], i + 1
            elif name not in flags:
                fail("unknown flag: %s\n\nUsage:  docker %s [OPTIONS]\n\nRun 'docker %s --help' for more information" % (name, sys.argv[1], sys.argv[1]), 125)
            else:
                value = value if eq else "true"
            found.append((name, value))
            continue
        a = a[1:]
        while a:
            letter, a = "-" + a[0], a[1:]
            if letter in valued:
                if a[:1] == "=":
                    a = a[1:]
                if not a:
                    if i >= len(argv):
                        fail("flag needs an argument: '%s' in -%s" % (letter[1:], letter[1:]), 125)
                    a, i = argv[i], i + 1
                found.append((letter, a))
                a = ""
            elif letter in flags:
                found.append((letter, "true"))
            else:
                fail("unknown shorthand flag: '%s' in -%s" % (letter[1:], letter[1:] + a), 125)
    return found, argv[i:]

def mixed(argv, valued, flags):
    # options anywhere, as most docker commands allow
    found, rest = [], []
    while argv:
        got, argv = options(argv, valued, flags)
        found += got
        if argv:
            rest.append(argv[0])
            argv = argv[1:]
    return found, rest

def template(text, values):
    out, text = "", text.replace("\\t", "\t").replace("\\n", "\n")
    while "{{" in text:
        before, _, text = text.partition("{{")
        key, _, text = text.partition("}}")
        out += before
        key = key.strip()
        if key.startswith("json "):
            key = key[5:].strip()
            out += json.dumps(values.get("") if key == "." else values.get(key, None))
        elif key in values:
            v = values[key]
            out += "[" + " ".join(v) + "]" if isinstance(v, list) else str(v).lower() if isinstance(v, bool) else str(v)
        else:
            fail("template parsing error: template: :1:2: executing \"\" at <%s>: map has no entry for key \"%s\"" % (key, key.split(".")[-1]))
    return out + text

RUN_VALUED = set("-e --env -v --volume -p --publish --network --net --entrypoint --name --shm-size --ulimit --gpus -m --memory "
    "--memory-swap --pids-limit --stop-timeout --stop-signal --device --env-file --ipc --pid -u --user -w --workdir -h --hostname "
    "-l --label --restart --cap-add --cap-drop --security-opt --mount --add-host --log-driver --log-opt --runtime --cpus --pull "
    "--platform --tmpfs --cpuset-cpus --oom-score-adj --health-cmd --group-add --userns --cgroupns --network-alias --dns".split())
RUN_FLAGS = set("-d --detach --rm -i --interactive -t --tty --privileged --init --read-only --no-healthcheck --oom-kill-disable -P -q --quiet".split())

def full_name(image):
    last = image.rsplit("/", 1)[-1]
    return image if ":" in last or "@" in last else image + ":latest"

def images():
    listed = control("images")
    return None if listed is None else [full_name(x) for x in listed.split()]

def read_env(found):
    env = []
    for name, value in found:
        if name in ("-e", "--env"):
            if "=" in value:
                env.append(value)
            elif value in os.environ:
                env.append(value + "=" + os.environ[value])
        elif name == "--env-file":
            try:
                for line in open(value):
                    line = line.strip()
                    if line and not line.startswith("#"):
                        env.append(line if "=" in line else line + "=" + os.environ.get(line, ""))
            except OSError:
                fail("docker: open %s: no such file or directory" % value, 125)
    return env

def run(argv):
    found, rest = options(argv, RUN_VALUED, RUN_FLAGS)
    got = dict(found)
    if not rest:
        fail("docker: 'docker run' requires at least 1 argument", 125)
    image, cmd = rest[0], rest[1:]
    if not all(c.isalnum() or c in "._/:@-" for c in image) or image != image.lower() and ":" not in image:
        fail("docker: invalid reference format\n\nRun 'docker run --help' for more information", 125)
    known = images()
    if known is not None and full_name(image) not in known:
        fail("Unable to find image '%s' locally\ndocker: Error response from daemon: pull access denied for %s, repository does not exist "
             "or may require 'docker login'\n\nRun 'docker run --help' for more information" % (full_name(image), image.split(":")[0]), 125)
    cid = new_id()
    name = got.get("--name") or "rig_" + cid[:8]
    detach = "-d" in got or "--detach" in got
    meta = {"id": cid, "name": name, "image": image, "cmd": cmd, "env": read_env(found), "args": argv, "rm": "--rm" in got,
            "volumes": [v for k, v in found if k in ("-v", "--volume")], "options": found, "init": "--init" in got,
            "stop_signal": got.get("--stop-signal", "SIGTERM"), "stop_timeout": got.get("--stop-timeout"), "created": stamp(),
            "sleeps": bool(cmd) and (cmd[0] == "earlyoom" or cmd[:2] == ["sleep", "infinity"])}
    argv = list(cmd)
    if got.get("--entrypoint"):
        argv = [got["--entrypoint"]] + argv
    elif "vllm-openai" in image and "--entrypoint" not in got:
        argv, meta["sleeps"] = ["vllm", "serve"] + argv, False      # the image's entrypoint
    argv = argv or ["true"]
    fresh, cdir = STATE + "/.new-" + cid, STATE + "/" + name
    os.makedirs(fresh + "/proc")
    os.mkdir(fresh + "/execs")
    for link in ("self", "meminfo", "uptime", "loadavg", "stat", "version", "cpuinfo"):
        os.symlink("/proc/" + link, fresh + "/proc/" + link)
    open(fresh + "/log", "w").close()
    with open(fresh + "/meta.json", "w") as f:
        json.dump(meta, f)
    try:
        os.rename(fresh, cdir)      # fails on a name in use, so two launches at once have one winner
    except OSError:
        import shutil
        shutil.rmtree(fresh, ignore_errors=True)
        other = load(cdir) or {"id": "?"}
        fail('docker: Error response from daemon: Conflict. The container name "/%s" is already in use by container "%s". You have to '
             "remove (or rename) that container to be able to reuse that name.\n\nRun 'docker run --help' for more information"
             % (name, other["id"]), 125)
    event(meta, "create")
    event(meta, "start")
    if meta["sleeps"]:
        if detach:
            print(cid)
            return 0
        while os.path.exists(cdir) and load(cdir) and os.path.exists(ROOT):
            time.sleep(0.05)
        return 137
    env = surroundings(meta)
    if argv[0] == "python3":        # only an image that a test gave a vLLM has a Python
        env["PYTHONPATH"] = SPARK + "/image"
    full = path_of(argv[0], env) if argv[0] != "python3" or control("image/vllm/__init__.py") is not None else None
    if not full:
        meta["rm"] = True
        ended(cdir, meta, 127)
        fail('docker: Error response from daemon: failed to create task for container: failed to create shim task: OCI runtime create failed: '
             'runc create failed: unable to start container process: error during container init: exec: "%s": executable file not found in $PATH' % argv[0], 127)
    if detach:
        background(cdir, meta, full, argv, env, env.get("HOME", "/"), main=True)
        print(cid)
        return 0
    code = wait_for(cdir, meta, foreground(cdir, meta, full, argv, env, env.get("HOME", "/"), "-i" in got or "--interactive" in got))
    ended(cdir, meta, code)
    return code

def execute(argv):
    found, rest = options(argv, set("-e --env -w --workdir -u --user --env-file --detach-keys".split()),
                          set("-d --detach -i --interactive -t --tty --privileged".split()))
    got = dict(found)
    if len(rest) < 2:
        fail("docker: 'docker exec' requires at least 2 arguments")
    cdir, meta = need(rest[0], running=True)
    argv, env = rest[1:], surroundings(meta, read_env(found))
    cwd = got.get("-w") or got.get("--workdir") or ""
    cwd = cwd if os.path.isdir(cwd) else env.get("HOME", "/")
    full = path_of(argv[0], env)
    if not full:
        fail('OCI runtime exec failed: exec failed: unable to start container process: exec: "%s": executable file not found in $PATH: unknown' % argv[0], 126)
    if "-d" in got or "--detach" in got:
        if "-c" in argv[1:-1]:
            at = argv.index("-c") + 1
            argv[at] = argv[at].replace("/proc/1/fd/1", "/dev/stdout")
        event(meta, "exec_start")
        background(cdir, meta, full, argv, env, cwd)
        sync(cdir, meta)
        return 0
    if "-c" in argv[1:-1]:
        import re
        at = argv.index("-c") + 1
        if re.search(r"\bkill\b[^;|&\n]*\s-?1\s*($|[;|&\n)])", argv[at]):
            # There is no pid namespace here: this would hit the machine the tests run on.
            fail("rig: refused, kill of pid 1 or -1 is not possible in the stand-in", 99)
        argv[at] = argv[at].replace("/proc/", cdir + "/proc/")
    sync(cdir, meta)
    exec_id = new_id()
    pid = foreground(cdir, meta, full, argv, env, cwd, "-i" in got or "--interactive" in got)
    try:
        with open(cdir + "/execs/" + exec_id, "w") as f:
            f.write(str(pid))
    except OSError:
        pass
    sync(cdir, meta)
    code = wait_for(cdir, meta, pid)
    try:
        os.unlink(cdir + "/execs/" + exec_id)
    except OSError:
        pass
    event(meta, "exec_die", execID=exec_id, exitCode=str(code))
    return code

def exec_ids(cdir, meta):
    live, found = processes(meta), []
    for name in sorted(os.listdir(cdir + "/execs")):
        try:
            with open(cdir + "/execs/" + name) as f:
                pid = f.read()
        except OSError:
            continue
        if pid.isdigit() and int(pid) in live:
            found.append(name)
    return found

def inspect(argv):
    found, names = mixed(argv, {"-f", "--format", "--type"}, {"-s", "--size"})
    got = dict(found)
    wanted, code, plain = got.get("-f") or got.get("--format"), 0, []
    for name in names:
        cdir, meta = find(name)
        if not meta:
            sys.stdout.write("\n" if wanted else "")
            sys.stdout.flush()
            sys.stderr.write("Error: No such object: %s\n" % name)
            code = 1
            continue
        try:
            ids = exec_ids(cdir, meta)
        except OSError:
            ids = []
        started = meta["created"]
        v = {".Id": meta["id"], ".Name": "/" + meta["name"], ".Created": started, ".ExecIDs": ids, ".Config.Image": meta["image"],
             ".Image": image_id(meta["image"]), ".Config.Env": meta["env"], ".HostConfig.AutoRemove": meta["rm"], ".RestartCount": 0,
             ".State.Running": meta["running"], ".State.OOMKilled": control("oom_killed") is not None, ".State.ExitCode": meta["exit"],
             ".State.Status": "running" if meta["running"] else "exited", ".State.StartedAt": started, ".State.Dead": False,
             ".State.Paused": False, ".State.Restarting": False, ".State.Pid": 4190000 if meta["running"] else 0, ".Config.Cmd": meta["cmd"]}
        tree = {}
        for key, value in v.items():
            at, parts = tree, key[1:].split(".")
            for part in parts[:-1]:
                if not isinstance(at.get(part), dict):
                    at[part] = {}
                at = at[part]
            at[parts[-1]] = value
        v[""], v[".State"], v[".Config"] = tree, tree["State"], tree["Config"]
        if wanted:
            print(template(wanted, v))
        else:
            plain.append(tree)
    if not wanted:
        print(json.dumps(plain, indent=4))
    return code

def image_id(image):
    import hashlib
    return "sha256:" + hashlib.sha256(((control("image_id") or "") + full_name(image)).encode()).hexdigest()

def image(argv):
    if argv[:1] == ["ls"]:
        return image_list(argv[1:])
    if argv[:1] != ["inspect"]:
        fail("docker: 'docker image %s' is not in the stand-in" % " ".join(argv))
    found, names = mixed(argv[1:], {"-f", "--format", "--platform"}, set())
    wanted, code, known = dict(found).get("-f") or dict(found).get("--format"), 0, images()
    for name in names:
        if known is not None and full_name(name) not in known:
            sys.stdout.write("\n" if wanted else "[]\n")
            sys.stdout.flush()
            sys.stderr.write("Error response from daemon: No such image: %s\n" % full_name(name))
            code = 1
            continue
        v = {".Id": image_id(name), ".RepoTags": [full_name(name)], ".Created": "2026-09-20T08:00:00Z", ".Size": 21474836480, ".Architecture": "arm64"}
        v[""] = {k[1:]: x for k, x in v.items() if k}
        print(template(wanted, v) if wanted else json.dumps([v[""]], indent=4))
    return code

def image_list(argv):
    found, _ = mixed(argv, {"--format", "-f", "--filter"}, {"-a", "-q", "--quiet", "--no-trunc"})
    wanted = dict(found).get("--format")
    for name in images() or ["vllm-node:latest"]:
        repository, _, tag = name.rpartition(":")
        v = {".Repository": repository, ".Tag": tag, ".ID": image_id(name)[7:19], ".Size": "21.5GB", ".CreatedSince": "2 months ago"}
        v[""] = {k[1:]: x for k, x in v.items() if k}
        print(template(wanted or "{{.Repository}}\t{{.Tag}}\t{{.ID}}\t{{.Size}}", v))
    return 0

def ps(argv):
    import re
    found, _ = mixed(argv, {"-f", "--filter", "--format", "-n", "--last"}, {"-a", "--all", "-q", "--quiet", "--no-trunc", "-s", "-l"})
    got, rows = dict(found), []
    filters = [v.partition("=")[::2] for k, v in found if k in ("-f", "--filter")]
    everything = "-a" in got or "--all" in got or any(k == "status" for k, _ in filters)
    for cdir, meta in containers():
        if not (meta["running"] or everything):
            continue
        wanted = {}
        for key, value in filters:      # same key: any of them; other keys: all of them
            ok = (bool(re.search(value, meta["name"]) or re.search(value, "/" + meta["name"])) if key == "name" else
                  value == ("running" if meta["running"] else "exited") if key == "status" else
                  meta["id"].startswith(value) if key == "id" else full_name(value) == full_name(meta["image"]) if key == "ancestor" else True)
            wanted[key] = wanted.get(key, False) or ok
        if not all(wanted.values()):
            continue
        cid = meta["id"] if "--no-trunc" in got else meta["id"][:12]
        v = {".ID": cid, ".Names": meta["name"], ".Image": meta["image"], ".State": "running" if meta["running"] else "exited",
             ".Status": "Up 5 minutes" if meta["running"] else "Exited (%d) 5 seconds ago" % meta["exit"], ".Ports": "",
             ".Command": '"%s"' % " ".join(meta["cmd"])[:20], ".CreatedAt": meta["created"], ".RunningFor": "5 minutes ago"}
        v[""] = {k[1:]: x for k, x in v.items() if k}
        rows.append(v)
    wanted = got.get("--format")
    if wanted and wanted.startswith("table "):
        wanted = wanted[6:]
        print(template(wanted, {k: k[1:].upper() for k in (".ID", ".Names", ".Image", ".State", ".Status", ".Ports", ".Command", ".CreatedAt", ".RunningFor")}))
    if "-q" in got or "--quiet" in got:
        wanted = "{{.ID}}"
    if not wanted:
        wanted = "{{.ID}}   {{.Image}}   {{.Command}}   {{.RunningFor}}   {{.Status}}   {{.Ports}}   {{.Names}}"
        print("CONTAINER ID   IMAGE     COMMAND   CREATED   STATUS    PORTS     NAMES")
    for v in rows:
        print(template(wanted, v))
    return 0

def top(argv):
    if not argv:
        fail("docker: 'docker top' requires at least 1 argument")
    cdir, meta = need(argv[0], running=True)
    columns, words = ["uid", "pid", "ppid", "cmd"], argv[1:]
    for i, word in enumerate(words):
        if word.startswith("-") and word.endswith("o") and i + 1 < len(words):
            columns = words[i + 1].split(",")
        elif word.startswith("-") and "o" in word and "," in word:
            columns = word[word.index("o") + 1:].split(",")
    rows = [[c.upper() if c not in ("args", "cmd", "command", "comm") else "COMMAND" for c in columns]]
    listed = [(4190000, ["sleep", "infinity"] if meta["cmd"][:1] != ["earlyoom"] else meta["cmd"])] if meta["sleeps"] else []
    for pid, args in listed + [(p, cmdline(p)) for p in processes(meta)]:
        if args and args[0]:
            v = {"pid": pid, "ppid": 1, "uid": "root", "user": "root", "args": " ".join(args), "comm": os.path.basename(args[0])}
            v["cmd"] = v["command"] = v["args"]
            rows.append([str(v.get(c.strip().split("=")[0], "-")) for c in columns])
    for row in rows:
        print("".join(x.ljust(20) for x in row[:-1]) + row[-1])
    return 0

def logs(argv):
    found, names = mixed(argv, {"--since", "--until", "--tail", "-n"}, {"-f", "--follow", "-t", "--timestamps", "--details"})
    got = dict(found)
    if len(names) != 1:
        fail("docker: 'docker logs' requires 1 argument")
    since = stamp(when("since", got["--since"])) if got.get("--since") else ""
    until = stamp(when("until", got["--until"])) if got.get("--until") else "~"
    tail = got.get("--tail") or got.get("-n") or "all"
    follow, marks = "-f" in got or "--follow" in got, "-t" in got or "--timestamps" in got
    cdir, meta = need(names[0])
    f, rest, first = open(cdir + "/log", "rb"), b"", True
    while True:
        now = load(cdir) if follow else None
        live = bool(now and now["running"] and now["id"] == meta["id"])      # asked before reading: the last lines must not be lost
        lines = (rest + f.read()).split(b"\n")
        rest = lines.pop()
        lines = [x for x in lines if since <= x[:30].decode("ascii", "replace") <= until]
        if first and tail != "all":
            lines = lines[-int(tail):] if int(tail) else []
        first = False
        if lines:
            data = b"".join((x if marks else x[31:]) + b"\n" for x in lines)
            try:
                while data:
                    data = data[os.write(1, data):]
            except OSError:
                os._exit(1)
        if not live:
            return 0
        if not os.path.exists(ROOT):
            return 1
        time.sleep(0.02)

def halt(cdir, meta, limit=None):
    import signal
    delay = float(control("stop_delay") or 0.2)
    if limit is None and meta["stop_timeout"] is not None:
        limit = meta["stop_timeout"]
    if limit is not None:
        delay = min(delay, float(limit))
    if meta["stop_signal"] in ("SIGKILL", "KILL", "9") or meta["init"] and meta["sleeps"]:
        delay = min(delay, 0.02)    # PID 1 heeds the signal
    event(meta, "kill", signal="15")
    if os.environ.get("RIG_FORCE"):
        delay = 0
    until = time.monotonic() + delay
    if not meta["sleeps"]:
        for pid in processes(meta):     # the main process is PID 1 and gets the signal
            try:
                os.kill(pid, signal.SIGTERM)
            except OSError:
                pass
    while time.monotonic() < until and load(cdir):
        if not meta["sleeps"] and not processes(meta):
            break
        time.sleep(0.01)
    now = load(cdir)
    if now and now["id"] == meta["id"] and now["running"]:
        ended(cdir, meta, 137)
    while True:                         # a shim may be half way through its own removal
        now = load(cdir)
        if not now or now["id"] != meta["id"] or not now["running"]:
            return
        time.sleep(0.01)

def stop(argv):
    found, names = mixed(argv, {"-t", "--time", "--timeout", "-s", "--signal"}, set())
    got, code = dict(found), 0
    for name in names:
        cdir, meta = find(name)
        if not meta:
            sys.stderr.write("Error response from daemon: No such container: %s\n" % name)
            code = 1
            continue
        block("stop_hangs")
        if meta["running"]:
            halt(cdir, meta, got.get("-t") or got.get("--time") or got.get("--timeout"))
        print(name)
    return code

def restart(argv):
    found, names = mixed(argv, {"-t", "--time", "--timeout", "-s", "--signal"}, set())
    for name in names:
        cdir, meta = find(name)
        if not meta:
            fail("Error response from daemon: No such container: %s" % name)
        if meta["running"]:
            halt(cdir, meta, dict(found).get("-t"))
        remove(cdir, meta)
        run(meta["args"])
    return 0

def kill(argv):
    import signal
    found, names = mixed(argv, {"-s", "--signal"}, set())
    which = dict(found).get("-s") or dict(found).get("--signal") or "KILL"
    number = int(which) if which.isdigit() else getattr(signal, "SIG" + which.upper().replace("SIG", ""))
    for name in names:
        cdir, meta = find(name)
        if not meta:
            fail("Error response from daemon: cannot kill container: %s: No such container: %s" % (name, name))
        if not meta["running"]:
            fail("Error response from daemon: cannot kill container: %s: container %s is not running" % (name, meta["id"]))
        if number == 9:
            ended(cdir, meta, 137)
        elif not meta["sleeps"]:
            for pid in processes(meta):
                os.kill(pid, number)
        print(name)
    return 0

def rm(argv):
    found, names = mixed(argv, set(), {"-f", "--force", "-v", "--volumes"})
    force, code = "-f" in dict(found) or "--force" in dict(found), 0
    for name in names:
        cdir, meta = find(name)
        if not meta:
            sys.stderr.write("Error response from daemon: No such container: %s\n" % name)
            code = code if force else 1
            continue
        block("stop_hangs")
        if meta["running"] and not force:
            sys.stderr.write('Error response from daemon: cannot remove container "/%s": container is running: stop the container before '
                             "removing or force remove\n" % meta["name"])
            code = 1
            continue
        slay(meta)
        if meta["running"]:
            event(meta, "die", exitCode="137")
        remove(cdir, meta)
        while True:
            now = load(cdir)
            if not now or now["id"] != meta["id"]:
                break
            time.sleep(0.01)
        print(name)
    return code

def events(argv):
    found, _ = mixed(argv, {"--since", "--until", "-f", "--filter", "--format"}, set())
    got = dict(found)
    since = when("since", got["--since"]) if got.get("--since") else time.time_ns()
    until = when("until", got["--until"]) if got.get("--until") else None
    filters, at = [v.partition("=")[::2] for k, v in found if k in ("-f", "--filter")], 0
    while True:
        over = until is not None and time.time_ns() >= until
        try:
            with open(SPARK + "/docker.events") as f:
                f.seek(at)
                text = f.read()
                at = f.tell()
        except OSError:
            text = ""
        for line in text.splitlines():
            e = json.loads(line)
            if e["time"] < since or until is not None and e["time"] > until:
                continue
            wanted = {}
            for key, value in filters:
                ok = (e["action"] == value if key == "event" else value == e["name"] or e["id"].startswith(value) if key == "container" else
                      value == "container" if key == "type" else full_name(value) == full_name(e["image"]) if key == "image" else True)
                wanted[key] = wanted.get(key, False) or ok
            if all(wanted.values()):
                v = {".Actor.Attributes." + k: x for k, x in e.items() if k not in ("time", "action", "id")}
                v.setdefault(".Actor.Attributes.exitCode", "<no value>")
                v.update({".Action": e["action"], ".Status": e["action"], ".Type": "container", ".ID": e["id"], ".Actor.ID": e["id"],
                          ".Time": e["time"] // 10**9, ".TimeNano": e["time"], ".time": e["time"] // 10**9, ".timeNano": e["time"]})
                v[""] = {"status": e["action"], "id": e["id"], "from": e["image"], "Type": "container", "Action": e["action"], "time": e["time"] // 10**9,
                         "timeNano": e["time"], "Actor": {"ID": e["id"], "Attributes": {k: x for k, x in e.items() if k not in ("time", "action", "id")}}}
                print(template(got.get("--format") or stamp(e["time"]) + " container {{.Action}} {{.ID}} (name={{.Actor.Attributes.name}})", v))
        sys.stdout.flush()
        if over:
            return 0
        if not os.path.exists(ROOT):
            return 1
        time.sleep(0.03)

# --- pgrep, pkill, killall: confined, since there is no pid namespace to confine them

def by_name(program, argv):
    import re, signal
    number, opts, pattern, i = signal.SIGTERM, "", None, 0
    while i < len(argv):
        a, i = argv[i], i + 1
        if a in ("--signal", "-s", "-P", "-u", "-U"):
            if a in ("--signal", "-s") and program != "pgrep":
                number, i = signal_number(argv[i]), i + 1
            else:
                i += 1
        elif a.startswith("-") and a[1:2].isdigit() or a.startswith("-") and a[1:2].isupper() and len(a) > 2:
            number = signal_number(a[1:])
        elif a.startswith("--"):
            opts += a[2:3]
        elif a.startswith("-"):
            opts += a[1:]
        else:
            pattern = a
    inside = os.environ.get("RIG_CONTAINER")
    if inside:
        pids = having("RIG_CONTAINER=" + inside)
    else:
        mine = set(having("RIG_ROOT=" + ROOT))
        pids = [p for p in having("RIG_SPARK=" + os.path.basename(SPARK)) if p in mine]
    hits = []
    for pid in pids:
        args = cmdline(pid)
        if pid == os.getpid() or not args or any(a.endswith(("/bin/docker", "/bin/ssh")) for a in args[:4]):
            continue
        try:
            comm = open("/proc/%d/comm" % pid).read().strip()
        except OSError:
            continue
        text = " ".join(args) if "f" in opts and program != "killall" else comm
        if (text == pattern) if program == "killall" else (re.fullmatch if "x" in opts else re.search)(pattern or "", text):
            hits.append((pid, comm, " ".join(args)))
    if program == "pgrep":
        if "c" in opts:
            print(len(hits))
        else:
            for pid, comm, args in hits:
                print(pid if not ("a" in opts or "l" in opts) else "%d %s" % (pid, args if "a" in opts else comm))
    else:
        for pid, _, _ in hits:
            try:
                os.kill(pid, number)
            except OSError:
                pass
        if program == "killall" and not hits:
            sys.stderr.write("%s: no process found\n" % pattern)
    return 0 if hits else 1

def signal_number(text):
    import signal
    return int(text) if text.isdigit() else getattr(signal, "SIG" + text.upper().replace("SIG", ""))

def main():
    program = os.path.basename(sys.argv[0])
    if program in ("pgrep", "pkill", "killall"):
        return by_name(program, sys.argv[1:])
    argv = sys.argv[1:]
    if argv[:1] == ["__shim"]:
        return shim(*argv[1:])
    if argv[:1] == ["container"]:
        argv = argv[1:]
    if not argv:
        fail("Usage:  docker [OPTIONS] COMMAND", 1)
    if argv[0] in ("--version", "-v"):
        print("Docker version 28.2.2, build e6534b4")
        return 0
    block("docker_hangs")
    if control("docker_down") is not None:
        fail("Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?")
    commands = {"run": run, "exec": execute, "inspect": inspect, "ps": ps, "top": top, "logs": logs, "stop": stop, "restart": restart, "kill": kill,
                "rm": rm, "events": events, "image": image, "images": image_list, "ls": ps}
    if argv[0] in commands:
        sys.argv[1:] = argv
        return commands[argv[0]](argv[1:])
    if argv[0] == "version":
        print("28.2.2")
        return 0
    if argv[0] == "info":
        print("28.2.2" if len(argv) > 1 else "Server:\n Server Version: 28.2.2")
        return 0
    if argv[0] == "pull":
        known = images()
        if known is not None and full_name(argv[-1]) not in known:
            with open(SPARK + "/images", "a") as f:
                f.write("\n" + argv[-1] + "\n")
        print("Status: Downloaded newer image for " + full_name(argv[-1]))
        return 0
    fail("docker: unknown command: docker %s\n\nRun 'docker --help' for more information" % argv[0])

code = main()
try:
    sys.stdout.flush()
except OSError:
    code = code or 1
os._exit(code or 0)
'''

NVIDIA_SMI = r'''#!/bin/sh
# Stand-in for nvidia-smi on a GB10: no memory of the GPU as a whole, but that of each process. <spark>/nvidia.json says more.
SPARK="@ROOT@/sparks/$RIG_SPARK"
export SPARK
if [ -e "$SPARK/glance" ] && [ ! -e "$SPARK/nvidia.json" ] && [ ! -e "$SPARK/nvidia_hangs" ]; then
    case "$*" in *query-gpu=*) echo "0, 3.42, 36, 208, 580.126.09" ;; esac
    exit 0
fi
exec @PYTHON@ -SE - "$@" <<'END'
import json, os, sys, time
SPARK = os.environ["SPARK"]
while os.path.exists(SPARK + "/nvidia_hangs") and os.path.exists(SPARK):
    time.sleep(0.02)
try:
    how = json.load(open(SPARK + "/nvidia.json"))
except OSError:
    how = {}
if how.get("fails"):
    print("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA driver is installed and running.")
    sys.exit(9)
asked = dict(a.split("=", 1) for a in sys.argv[1:] if "=" in a)
if "--query-gpu" in asked:
    known = {"name": "NVIDIA GB10", "driver_version": "580.126.09", "utilization.gpu": 0, "power.draw": "3.42", "temperature.gpu": 36,
             "clocks.current.sm": 208, "utilization.memory": 0, **how}
    print(", ".join(str(known.get(q, "[N/A]")) for q in asked["--query-gpu"].split(",")))
else:
    rows = how.get("apps")
    if rows is None:
        rows = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                env = open("/proc/%s/environ" % pid, "rb").read().split(b"\0")
                if b"RIG_SPARK=" + os.path.basename(SPARK).encode() in env and SPARK.encode() + b"/bin/vllm" in open("/proc/%s/cmdline" % pid, "rb").read():
                    rows.append([int(pid), how.get("mib", 19135)])
                    os.makedirs(SPARK + "/proc/" + pid, exist_ok=True)
                    full = [e[14:].decode() for e in env if e.startswith(b"RIG_CONTAINER=")]
                    open(SPARK + "/proc/%s/cgroup" % pid, "w").write("0::/system.slice/%s\n" % ("docker-%s.scope" % full[0] if full else "ssh.service"))
            except OSError:
                pass
    for row in rows:
        print("%s, %s" % tuple(row))
END
'''

JOURNALCTL = r'''#!/bin/sh
# Stand-in for journalctl -k --since @SECONDS: the kernel's own log.
case "$*" in *"--since @1"*) cat "@ROOT@/sparks/$RIG_SPARK/kernel" 2>/dev/null ;; *) exit 1 ;; esac
'''

# What vllm/entrypoints/cli/serve.py and vllm/utils/argparse_utils.py offer, as far as the parser of `vllm serve` needs it.
PARSER_PACKAGE = {
    "vllm/__init__.py": "", "vllm/entrypoints/__init__.py": "", "vllm/entrypoints/cli/__init__.py": "", "vllm/utils/__init__.py": "",
    "vllm/utils/argparse_utils.py": "from argparse import ArgumentParser as FlexibleArgumentParser\n",
    "vllm/entrypoints/cli/serve.py": r'''
import json, os, sys
assert "--port" not in sys.argv[0]

class Serve:
    def subparser_init(self, subparsers):
        p = subparsers.add_parser("serve")
        p.add_argument("model_tag", nargs="?")
        p.add_argument("--port", type=int)
        p.add_argument("--served-model-name", nargs="+")
        for name in ("--max-num-seqs", "--tensor-parallel-size", "--max-model-len"):
            p.add_argument(name, type=int)
        p.add_argument("--gpu-memory-utilization", type=float)
        p.add_argument("--dtype", choices=["auto", "float16"])
        p.add_argument("--speculative-config", "-sc", type=json.loads)
        p.add_argument("--enable-auto-tool-choice", action="store_true")
        p.add_argument("--tool-call-parser")
        p.add_argument("--override-generation-config", type=json.loads)
        with open(os.environ["HOME"] + "/../parsed", "a") as f:
            f.write(json.dumps(sys.argv) + "\n")
        return p

    def validate(self, args):
        if args.enable_auto_tool_choice and not args.tool_call_parser:
            raise TypeError("Error: --enable-auto-tool-choice requires --tool-call-parser")

def cmd_init():
    return [Serve()]
'''}

LAUNCHER = r'''#!/bin/bash
# Stand-in for launch-cluster.sh as of September 2026.
here="$(dirname "$(realpath "$0")")"
faults="$RIG_ROOT/sparks/$RIG_SPARK"
image=vllm-node name=vllm_node nodes="" solo="" daemon="" ray="" action="" command="" keep="sleep infinity" check=""
extra="-e NCCL_IGNORE_CPU_AFFINITY=1 -v ${HF_HOME:-$HOME/.cache/huggingface}:/root/.cache/huggingface $VLLM_SPARK_EXTRA_DOCKER_ARGS"

usage() {
    echo "Usage: $0 [-n <node_ips>] [-t <image_name>] [--name <container_name>] [--check-config] [--solo] [--ray|--no-ray] [-v <local:container>] [-d] [action] [command]"
    echo "  -n, --nodes     Comma-separated list of node IPs (Optional, auto-detected if omitted)"
    echo "  -t              Docker image name (Optional, default: $image)"
    echo "  --name          Container name (Optional, default: $name)"
    echo "  -e, --env       Environment variable to pass to container (e.g. -e VAR=val)"
    echo "  --solo          Solo mode: launch only on current node, do not launch Ray cluster"
    echo "  -p, --publish   Publish a container port (solo mode only)"
    echo "  -v, --volume    Map a volume"
    echo "  --ray           Use Ray for multi-node vLLM"
    echo "  --no-ray        Default for multi-node vLLM without Ray"
    echo "  --earlyoom      Run earlyoom as the container foreground process instead of sleep infinity"
    echo "  -d              Daemon mode (only for 'start' action)"
    echo "  action          start | stop | status | exec (Default: start)"
    exit 1
}

if [ -f "$faults/launcher_hangs" ]; then
    while [ -f "$faults/launcher_hangs" ]; do sleep 0.05; done
fi
if [ -f "$faults/launcher_exit" ]; then
    code="$(cat "$faults/launcher_exit")"
    echo "Error: something broke"
    exit "${code:-1}"
fi

while [ $# -gt 0 ]; do
    case "$1" in
        -n|--nodes) nodes="$2"; shift ;;
        -t) image="$2"; shift ;;
        --name) name="$2"; named=1; shift ;;
        -e|--env) extra="$extra -e $2"; shift ;;
        -v|--volume) extra="$extra -v $2"; shift ;;
        -p|--publish) extra="$extra -p $2"; shift ;;
        --eth-if|--ib-if|-j|--apply-mod|--master-port|--mem-limit-gb|--mem-swap-limit-gb|--pids-limit|--shm-size-gb|--config) shift ;;
        --nccl-debug|--no-cache-dirs|--keep-entrypoint|--non-privileged) ;;
        --check-config) check=1 ;;
        --solo) solo=1 ;;
        --ray) ray=1 ;;
        --no-ray) ray="" ;;
        --earlyoom) keep="earlyoom -M 524288,102400 -s 100 -r 60" ;;
        --earlyoom-args) keep="earlyoom $2"; shift ;;
        -d) daemon=1 ;;
        -h|--help) usage ;;
        start|stop|status) action="$1" ;;
        exec) action=exec; shift; command="$(printf '%q ' "$@")"; break ;;
        *) echo "Error: Unknown argument or action: $1"; usage ;;
    esac
    shift
done
action="${action:-start}"

if [ -f "$here/.env" ]; then
    echo "Loading configuration from .env file..."
    while IFS='=' read -r key value || [ -n "$key" ]; do
        case "$key" in
            ''|\#*) ;;
            CLUSTER_NODES) nodes="${nodes:-$value}" ;;
            CONTAINER_NAME) [ -n "$named" ] || name="$value" ;;
            CONTAINER_*) extra="$extra -e ${key#CONTAINER_}=$value" ;;
        esac
    done < "$here/.env"
fi

if [ -n "$solo" ]; then
    head="${SPARK_ADDRESS:-127.0.0.1}"
    peers=()
else
    if [ -z "$nodes" ]; then
        echo "Error: ibdev2netdev not found. Cannot auto-detect interfaces."
        exit 1
    fi
    IFS=, read -r -a peers <<< "${nodes// /}"
    head="${peers[0]}"
    peers=("${peers[@]:1}")
fi
[ -z "$check" ] || { echo "Configuration check complete."; exit 0; }

stop_cluster() {
    echo ""
    echo "Stopping cluster..."
    docker stop "$name" >/dev/null 2>&1
    for worker in "${peers[@]}"; do
        ssh "$worker" "docker stop $name" >/dev/null 2>&1
    done
    echo "Cluster stopped."
}

case "$action" in
    stop)
        stop_cluster
        exit 0 ;;
    status)
        if docker ps | grep -q "$name"; then echo "[HEAD] $head: Container '$name' is RUNNING."
        else echo "[HEAD] $head: Container '$name' is NOT running."; fi
        for worker in "${peers[@]}"; do
            if ssh "$worker" "docker ps | grep -q '$name'"; then echo "[WORKER] $worker: Container '$name' is RUNNING."
            else echo "[WORKER] $worker: Container '$name' is NOT running."; fi
        done
        exit 0 ;;
esac

# Without -d the launcher's end is the cluster's end, a lost ssh line included.
[ -n "$daemon" ] || trap 'trap - EXIT; stop_cluster; exit' EXIT INT TERM HUP

if [ "$action" = exec ] && [ ${#peers[@]} -gt 0 ]; then
    need=1 found="" last=""
    for word in $(sed 's/\(--[a-z-]*\)=/\1 /g' <<< "$command"); do
        case "$last" in
            -tp|--tensor-parallel-size|-pp|--pipeline-parallel-size|-dp|--data-parallel-size)
                [[ "$word" =~ ^[0-9]+$ ]] && need=$((need * word)) && found=1 ;;
        esac
        last="$word"
    done
    total=$((1 + ${#peers[@]}))
    if [ -n "$found" ] && [ $need -gt $total ]; then
        trap - EXIT
        echo "Error: Command requires $need nodes (tp*pp*dp) but only $total node(s) are configured."
        exit 1
    elif [ -n "$found" ] && [ $need -lt $total ]; then
        echo "Note: Command requires $need node(s); using $need of $total configured node(s)."
        peers=("${peers[@]:0:$((need - 1))}")
    fi
fi

running=""
docker ps --format '{{.Names}}' | grep -q "^$name$" && running=1
for worker in "${peers[@]}"; do
    ssh "$worker" "docker ps --format '{{.Names}}' | grep -q '^$name$'" && running=1
done
if [ -n "$running" ]; then
    echo "Warning: Container '$name' is already running on head node ($head)."
    echo "Cluster containers are already running. Skipping launch."
else
    if [ ${#peers[@]} -gt 0 ]; then
        here_id="$(docker image inspect --format '{{.Id}}' "$image" 2>/dev/null)"
        for worker in "${peers[@]}"; do
            if [ -z "$here_id" ] || [ "$(ssh "$worker" "docker image inspect --format '{{.Id}}' $image" 2>/dev/null)" != "$here_id" ]; then
                trap - EXIT
                echo "Error: Docker image mismatch on worker node ($worker):"
                echo "Error: Cluster launch aborted because image '$image' is not in sync."
                exit 1
            fi
        done
    fi
    # Unquoted on purpose: the real one splits these words on spaces too.
    line="docker run --privileged --ulimit nofile=1048576:1048576 --ipc=host --gpus all -d --rm --network host --name $name --entrypoint= $extra"
    echo "Starting Head Node on $head..."
    $line -e VLLM_HOST_IP=$head $image $keep
    for worker in "${peers[@]}"; do
        echo "Starting Worker Node on $worker..."
        ssh "$worker" "$line -e VLLM_HOST_IP=$worker $image $keep"
    done
    sleep "$(cat "$faults/launcher_sleep" 2>/dev/null || echo 0.05)"
fi

if [ "$action" = start ]; then
    if [ -n "$daemon" ]; then echo "Cluster started in background (Daemon mode)."; exit 0; fi
    echo "Cluster is running. Press Ctrl+C to stop."
    while docker ps --format '{{.Names}}' | grep -q "^$name$"; do sleep 0.1; done
    exit 0
fi

echo "Executing command: $command"
if [ ${#peers[@]} -gt 0 ]; then
    if [ -n "$ray" ]; then
        command="$command --distributed-executor-backend ray"
    elif grep -q "vllm serve" <<< "$command"; then
        command="$(sed -E 's/--distributed-executor-backend(=|[[:space:]]+)[^[:space:]]+//g' <<< "$command")"
        base="$command --nnodes $((1 + ${#peers[@]}))" rank=1
        for worker in "${peers[@]}"; do
            echo "Launching worker (rank $rank) on $worker..."
            printf -v remote 'docker exec -d %q bash -c %q' "$name" \
                "$base --node-rank $rank --master-addr $head --master-port 29501 --headless >> /proc/1/fd/1 2>&1"
            ssh -o BatchMode=yes -o StrictHostKeyChecking=no "$worker" "$remote"
            rank=$((rank + 1))
        done
        command="$base --node-rank 0 --master-addr $head --master-port 29501"
    fi
fi
if [ -n "$daemon" ]; then
    docker exec -d "$name" bash -c "$command >> /proc/1/fd/1 2>&1"
    echo "Command dispatched in background (Daemon mode). Container: $name"
    exit 0
fi
docker exec -i "$name" bash -c "$command"
'''

LAUNCHER_JAN = r'''#!/bin/bash
# Stand-in for launch-cluster.sh as of January 2026: no --solo, no --no-ray, exec only in the foreground.
here="$(dirname "$(realpath "$0")")"
faults="$RIG_ROOT/sparks/$RIG_SPARK"
image=vllm-node name=vllm_node nodes="" daemon="" action="" command=""
extra="-v $HOME/.cache/huggingface:/root/.cache/huggingface $VLLM_SPARK_EXTRA_DOCKER_ARGS"

usage() {
    echo "Usage: $0 [-n <node_ips>] [-t <image_name>] [--name <container_name>] [--check-config] [-d] [action] [command]"
    echo "  -n, --nodes     Comma-separated list of node IPs (Optional, auto-detected if omitted)"
    echo "  -t              Docker image name (Optional, default: $image)"
    echo "  --name          Container name (Optional, default: $name)"
    echo "  -d              Daemon mode (only for 'start' action)"
    echo "  action          start | stop | status | exec (Default: start)"
    exit 1
}

while [ -f "$faults/launcher_hangs" ]; do sleep 0.05; done
if [ -f "$faults/launcher_exit" ]; then
    code="$(cat "$faults/launcher_exit")"
    echo "Error: something broke"
    exit "${code:-1}"
fi

while [ $# -gt 0 ]; do
    case "$1" in
        -n|--nodes) nodes="$2"; shift ;;
        -t) image="$2"; shift ;;
        --name) name="$2"; shift ;;
        --eth-if|--ib-if|--nccl-debug|--apply-mod) shift ;;
        --check-config) echo "Configuration check complete."; exit 0 ;;
        -d) daemon=1 ;;
        -h|--help) usage ;;
        start|stop|status) action="$1" ;;
        exec) action=exec; shift; command="$(printf '%q ' "$@")"; break ;;
        *) echo "Error: Unknown argument or action: $1"; usage ;;
    esac
    shift
done
action="${action:-start}"
if [ -f "$here/.env" ]; then
    while IFS='=' read -r key value || [ -n "$key" ]; do
        [ "$key" != CLUSTER_NODES ] || nodes="${nodes:-$value}"
    done < "$here/.env"
fi
if [ -z "$nodes" ]; then
    echo "Error: ibdev2netdev not found. Cannot auto-detect interfaces."
    exit 1
fi
IFS=, read -r -a peers <<< "${nodes// /}"
head="${peers[0]}"
peers=("${peers[@]:1}")

stop_cluster() {
    echo ""
    echo "Stopping cluster..."
    docker stop "$name" >/dev/null 2>&1
    for worker in "${peers[@]}"; do
        ssh "$worker" "docker stop $name" >/dev/null 2>&1
    done
    echo "Cluster stopped."
}

case "$action" in
    stop) stop_cluster; exit 0 ;;
    status)
        for node in "$head" "${peers[@]}"; do
            if ssh "$node" "docker ps | grep -q '$name'"; then echo "[NODE] $node: Container '$name' is RUNNING."
            else echo "[NODE] $node: Container '$name' is NOT running."; fi
        done
        exit 0 ;;
esac

if [ "$action" = exec ] || [ -z "$daemon" ]; then
    trap 'trap - EXIT; stop_cluster; exit' EXIT INT TERM HUP
fi
if docker ps --format '{{.Names}}' | grep -q "^$name$"; then
    echo "Cluster containers are already running. Skipping launch."
else
    line="docker run --privileged --gpus all -d --rm --network host --name $name --entrypoint= $extra"
    $line $image sleep infinity
    for worker in "${peers[@]}"; do
        ssh "$worker" "$line $image sleep infinity"
    done
    sleep "$(cat "$faults/launcher_sleep" 2>/dev/null || echo 0.05)"
fi
if [ "$action" = exec ]; then
    echo "Executing command on head node: $command"
    docker exec -i "$name" bash -c "$command" &
    wait $!        # so that a signal is heeded at once
    exit $?
fi
[ -z "$daemon" ] || { echo "Cluster started in background (Daemon mode)."; exit 0; }
while docker ps --format '{{.Names}}' | grep -q "^$name$"; do sleep 0.1; done
'''

VLLM = r'''#!@PYTHON@ -SE
# Stand-in for "vllm serve". What goes wrong is set in <spark>/vllm.json, by served name or model.
import json, os, signal, socket, sys, threading, time
ROOT = "@ROOT@"
SPARK = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VERSION = "0.33.0"
MULTI = set("--served-model-name --api-key --lora-modules --middleware --ssl-ciphers --cuda-graph-sizes --cudagraph-capture-sizes".split())
INTS = set("--port --max-num-seqs --tensor-parallel-size --pipeline-parallel-size --data-parallel-size --nnodes --node-rank --master-port "
    "--seed --block-size --swap-interval --max-logprobs --api-server-count --decode-context-parallel-size --shutdown-timeout "
    "--max-parallel-loading-workers --data-parallel-rank --stream-interval --max-lora-rank --max-loras".split())
HUMAN = set("--max-model-len --max-num-batched-tokens --kv-cache-memory-bytes --long-prefill-token-threshold".split())
FLOATS = set("--gpu-memory-utilization --cpu-offload-gb --device-memory-utilization".split())
JSONS = set("--speculative-config --compilation-config --hf-overrides --override-generation-config --limit-mm-per-prompt --mm-processor-kwargs "
    "--default-chat-template-kwargs --kv-transfer-config --model-loader-extra-config --additional-config --attention-config".split())
STRINGS = set("--host --model --tokenizer --tokenizer-mode --load-format --kv-cache-dtype --attention-backend --moe-backend --quantization "
    "--distributed-executor-backend --tool-call-parser --reasoning-parser --runner --convert --chat-template --chat-template-content-format "
    "--master-addr --uvicorn-log-level --root-path --revision --download-dir --safetensors-load-strategy --config-format --generation-config "
    "--allowed-origins --allowed-methods --allowed-headers --ssl-keyfile --ssl-certfile --task-type --structured-outputs-config --log-config-file "
    "--tool-parser-plugin --reasoning-parser-plugin --response-role --tokenizer-revision --code-revision --config --mamba-ssm-cache-dtype "
    "--mamba-cache-mode --scheduling-policy --performance-mode --optimization-level --logits-processors --otlp-traces-endpoint --prefix-caching-hash-algo".split())
CHOICES = {"--dtype": "auto bfloat16 float float16 float32 half".split()}
BOOLS = set("--trust-remote-code --enforce-eager --enable-prefix-caching --enable-chunked-prefill --async-scheduling --enable-auto-tool-choice "
    "--enable-expert-parallel --headless --enable-sleep-mode --enable-server-load-tracking --disable-log-stats --enable-log-requests "
    "--disable-log-requests --disable-uvicorn-access-log --enable-lora --language-model-only --disable-frontend-multiprocessing "
    "--enable-prompt-tokens-details --enable-request-id-headers --skip-mm-profiling --disable-custom-all-reduce --calculate-kv-scales "
    "--enable-force-include-usage --return-tokens-as-token-ids --disable-access-log-for-endpoints --use-tqdm-on-load --enable-scale-out "
    "--enable-reasoning --skip-tokenizer-init --enable-dbo --disable-hybrid-kv-cache-manager --enable-flashinfer-autotune".split())
SHORT = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size", "-dp": "--data-parallel-size", "-sc": "--speculative-config",
    "-cc": "--compilation-config", "-q": "--quantization", "-dcp": "--decode-context-parallel-size", "-n": "--nnodes", "-r": "--node-rank",
    "-asc": "--api-server-count", "-O": "--optimization-level", "-ac": "--attention-config"}
VALUED = MULTI | INTS | HUMAN | FLOATS | JSONS | STRINGS | set(CHOICES)
FOREIGN = bool(os.environ.get("RIG_FOREIGN"))
ME = os.getpid()

def write(text):
    try:
        os.write(1, text.encode())
    except OSError:
        pass        # nobody reads: the real one goes on too

def say(process, where, text, level="INFO"):
    pid = ME if process == "APIServer" else ME + 34
    head = "(%s pid=%d) %s %s [%s] " % (process, pid, level, time.strftime("%m-%d %H:%M:%S", time.gmtime()), where)
    write("".join(head + line + "\n" for line in text.split("\n")))

def reject(text, code=2):
    write("usage: vllm serve [model_tag] [options]\nvllm serve: error: " + text + "\n")
    os._exit(code)

def number(text):
    units = {"k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}
    if text in ("auto", "-1"):
        return 4096
    return int(float(text[:-1]) * units[text[-1]]) if text[-1:] in units else int(text)

def parse(argv):
    got, unknown, positional, i = {}, [], [], 0
    loose = False       # argparse lists the words after an unknown flag with it

    def flaglike(t):
        return t.startswith("-") and len(t) > 1 and not t[1:].replace(".", "").isdigit()

    while i < len(argv):
        a, i = argv[i], i + 1
        if not flaglike(a):
            if not positional and not loose:
                positional.append(a)
            else:
                unknown.append(a)
            continue
        name, eq, value = a.partition("=")
        base = name.partition(".")[0]
        base = SHORT.get(base, base if not base.startswith("--") else base.replace("_", "-"))
        if name[:2] == "-O" and name[2:].isdigit():
            continue
        if base.startswith("--no-") and "--" + base[5:] in BOOLS:
            got["--" + base[5:]], loose = False, False
            continue
        if base in BOOLS:
            got[base], loose = True, False
            continue
        if base not in VALUED:
            unknown.append(a)
            loose = True
            continue
        loose = False
        if not eq:
            values = []
            while i < len(argv) and not flaglike(argv[i]) and (base in MULTI or not values):
                values.append(argv[i])
                i += 1
            if not values:
                reject("argument %s: expected %s argument" % (base, "at least one" if base in MULTI else "one"))
        else:
            values = [value]
        value = values[-1]
        try:
            if base in INTS:
                value = int(value)
            elif base in HUMAN:
                value = number(value)
            elif base in FLOATS:
                value = float(value)
        except ValueError:
            reject("argument %s: invalid %s value: %r" % (base, "float" if base in FLOATS else "int", value))
        if base in CHOICES and value not in CHOICES[base]:
            reject("argument %s: invalid choice: %r (choose from %s)" % (base, value, ", ".join(map(repr, CHOICES[base]))))
        if base in JSONS and "." not in name:
            try:
                json.loads(value)
            except ValueError:
                label = {"--speculative-config": "/-sc", "--compilation-config": "/-cc"}.get(base, "")
                reject("argument %s%s: Value %s cannot be converted to <function loads at 0x7f5432ed5300>." % (base, label, value))
        got[base] = values if base in MULTI else value
    return got, unknown, positional

def behaviour():
    if os.environ.get("RIG_BEHAVIOUR"):
        return json.loads(os.environ["RIG_BEHAVIOUR"])
    try:
        with open(SPARK + "/vllm.json") as f:
            known = json.load(f)
    except (OSError, ValueError):
        return {}
    for name in NAMES + [MODEL, "*"]:
        if name in known:
            return known[name]
    return {}

def traceback(last, process=None, where=""):
    text = ('Traceback (most recent call last):\n  File "/usr/local/lib/python3.12/dist-packages/vllm/v1/engine/core.py", line 1482, in run_engine_core\n'
            "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)\n"
            "                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^\n" + last)
    if process:
        say(process, where, text, "ERROR")
    else:
        write(text + "\n")

def frontend(last):
    write('Traceback (most recent call last):\n  File "/usr/local/bin/vllm", line 8, in <module>\n    sys.exit(main())\n             ^^^^^^\n'
          '  File "/usr/local/lib/python3.12/dist-packages/vllm/entrypoints/cli/main.py", line 120, in main\n    args.dispatch_function(args)\n'
          '  File "/usr/local/lib/python3.12/dist-packages/vllm/entrypoints/cli/serve.py", line 156, in cmd\n    uvloop.run(run_server(args))\n' + last + "\n")

def engine_fails(last):
    say("EngineCore", "core.py:1584", "EngineCore failed to start.", "ERROR")
    traceback(last, "EngineCore", "core.py:1584")
    write("Process EngineCore:\n")
    traceback(last)
    say("APIServer", "utils.py:628", "[shutdown] Process manager: send sigterm to process EngineCore")
    frontend("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_DP0': 1}")
    os._exit(1)

def port_in_use():
    frontend('  File "/usr/local/lib/python3.12/dist-packages/vllm/entrypoints/launchers/launcher.py", line 348, in create_server_socket\n'
             "    sock.bind(addr)\nOSError: [Errno 98] Address already in use")
    os._exit(1)

def fail(mode):
    if mode == "oom":
        say("EngineCore", "gpu_model_runner.py:5077", "Failed to load model - not enough GPU memory. Try lowering --gpu-memory-utilization to free memory "
            "for weights, increasing --tensor-parallel-size, or using --quantization.", "ERROR")
        engine_fails("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.12 GiB. GPU 0 has a total capacity of 121.69 GiB of which "
                     "3.27 GiB is free. Of the allocated memory 112.40 GiB is allocated by PyTorch.")
    if mode == "kv":
        engine_fails("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing the engine (this "
                     "flag also controls CPU memory reservation on the CPU backend, despite its name). See "
                     "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details.")
    if mode == "free_memory":
        engine_fails("ValueError: Free memory on device cuda:0 (20.1/121.69 GiB) on startup is less than desired GPU memory utilization (0.9, 109.52 GiB). "
                     "Decrease GPU memory utilization or reduce GPU memory used by other processes.")
    if mode == "missing":
        frontend("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the specified revision on the "
                 "local disk and outgoing traffic has been disabled. To enable repo look-ups and downloads online, pass 'local_files_only=False' as input.")
        os._exit(1)
    if mode == "killed":
        os.kill(ME, signal.SIGKILL)
        time.sleep(5)
    os._exit(1)         # die: without a word

def note(record):
    fd = os.open(SPARK + ("/foreign.log" if FOREIGN else "/requests.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, json.dumps(record).encode() + b"\n")
    os.close(fd)

LOCK = threading.Lock()
ACTIVE = {}             # id -> record of what is being served
COUNT = {"prompt": 0, "generation": 0, "stop": 0, "length": 0, "abort": 0, "error": 0, "requests": 0, "seconds": 0.0}
DYING = []
DEAD = []

def leave(signum=None, frame=None):
    say("EngineCore", "core.py:1454", "[shutdown] EngineCore: trigger received signal=SIGTERM")
    say("APIServer", "launcher.py:254", "[shutdown] API server: shutdown triggered")
    for record in list(ACTIVE.values()):
        note(dict(record, completed=False, aborted=True))
    write("INFO:     Shutting down\nINFO:     Waiting for application shutdown.\nINFO:     Application shutdown complete.\n")
    os._exit(behaviour().get("exit", 0))

def late_death():
    # As seen: the engine is gone, /health says 503 for a moment, then a clean-looking end with exit code 0.
    DEAD.append(1)
    say("EngineCore", "core.py:1510", "EngineCore encountered a fatal error.", "ERROR")
    say("APIServer", "async_llm.py:906", "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause.", "ERROR")
    time.sleep(0.05)
    leave()

class Gone(Exception):
    pass

def client_left(sock):
    try:
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True

def pause(sock, seconds):
    until = time.monotonic() + seconds
    while True:
        if client_left(sock):
            raise Gone
        left = until - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, 0.02))

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error", 503: "Service Unavailable"}

class Connection:
    def __init__(self, sock, peer):
        self.sock, self.peer, self.rest = sock, peer, b""
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def more(self):
        data = self.sock.recv(65536)
        if not data:
            raise Gone
        self.rest += data

    def line(self):
        while b"\r\n" not in self.rest:
            self.more()
        line, _, self.rest = self.rest.partition(b"\r\n")
        return line

    def take(self, n):
        while len(self.rest) < n:
            self.more()
        data, self.rest = self.rest[:n], self.rest[n:]
        return data

    def serve(self):
        try:
            while self.one():
                pass
        except (Gone, OSError):
            pass
        finally:
            self.sock.close()

    def head(self, code, kind, extra):
        lines = ["HTTP/1.1 %d %s" % (code, REASONS.get(code, "?")), "date: " + time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()), "server: uvicorn"]
        if kind:
            lines.append("content-type: " + kind)
        lines += extra
        if not self.keep:
            lines.append("connection: close")
        write('INFO:     %s:%d - "%s %s HTTP/1.1" %d %s\n' % (self.peer[0], self.peer[1], self.method, self.target, code, REASONS.get(code, "?")))
        return "\r\n".join(lines).encode() + b"\r\n\r\n"

    def send(self, code, body=b"", kind="application/json"):
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body, separators=(",", ":"))
        if isinstance(body, str):
            body = body.encode()
        data = self.head(code, kind if body else None, ["content-length: %d" % len(body)])
        self.sock.sendall(data if self.method == "HEAD" else data + body)

    def error(self, code, message, kind, param=None):
        self.send(code, {"error": {"message": message, "type": kind, "param": param, "code": code}})

    def one(self):
        first = self.line().decode("latin-1")
        if not first:
            return True
        try:
            self.method, self.target, version = first.split(" ")
        except ValueError:
            return False
        headers = {}
        while True:
            text = self.line().decode("latin-1")
            if not text:
                break
            key, _, value = text.partition(":")
            headers[key.strip().lower()] = value.strip()
        self.keep = headers.get("connection", "").lower() != "close" and version != "HTTP/1.0"
        if headers.get("expect", "").lower() == "100-continue":
            self.sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = b""
            while True:
                size = int(self.line().split(b";")[0], 16)
                body += self.take(size)
                self.line()
                if not size:
                    break
        else:
            body = self.take(int(headers.get("content-length", 0) or 0))
        path = self.target.partition("?")[0]
        if path.startswith("/v1") and KEYS and headers.get("authorization", "") not in ["Bearer " + k for k in KEYS]:
            self.send(401, {"error": "Unauthorized"})
        else:
            self.answer(path, body)
        return self.keep

    def answer(self, path, body):
        known = {"/health": "GET", "/ping": "GET POST", "/version": "GET", "/v1/models": "GET", "/metrics": "GET", "/load": "GET",
                 "/v1/chat/completions": "POST", "/v1/completions": "POST"}
        if path not in known:
            return self.send(404, {"detail": "Not Found"})
        if self.method not in known[path].split() and self.method != "HEAD":
            return self.send(405, {"detail": "Method Not Allowed"})
        if path in ("/health", "/ping"):
            return self.send(503 if DEAD else 200)
        if path == "/version":
            return self.send(200, {"version": VERSION})
        if path == "/load":
            return self.send(200, {"server_load": len(ACTIVE)})
        if path == "/metrics":
            return self.send(200, metrics(), "text/plain; version=1.0.0; charset=utf-8")
        if path == "/v1/models":
            permission = {"id": "modelperm-%x" % ME, "object": "model_permission", "created": STARTED, "allow_create_engine": False, "allow_sampling": True,
                          "allow_logprobs": True, "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False, "organization": "*",
                          "group": None, "is_blocking": False}
            self.send(200, {"object": "list", "data": [{"id": n, "object": "model", "created": STARTED, "owned_by": "vllm", "root": MODEL, "parent": None,
                                                        "max_model_len": LENGTH, "permission": [permission]} for n in NAMES]})
            if behaviour().get("mode") == "late_death" and not DYING:
                DYING.append(1)
                timer = threading.Timer(float(behaviour().get("after", 0.3)), late_death)
                timer.daemon = True
                timer.start()
            return
        self.complete(path, body)

    def complete(self, path, body):
        try:
            asked = json.loads(body)
            if not isinstance(asked, dict):
                raise ValueError
        except ValueError:
            note({"served": NAMES[0], "model": None, "path": path, "body": body.decode("utf-8", "replace"), "completed": False, "aborted": False, "status": 400})
            return self.error(400, "[{'type': 'json_invalid', 'loc': ('body', 0), 'msg': 'JSON decode error'}]", "Bad Request")
        how, begun = behaviour(), time.time()
        wanted = asked.get("model")
        record = {"served": NAMES[0], "model": wanted, "path": path, "body": asked, "time": begun, "pid": ME}

        def refuse(code, message, kind, param=None):
            note(dict(record, completed=False, aborted=False, status=code))
            self.error(code, message, kind, param)

        if wanted and wanted not in NAMES:
            text = "The model `%s` does not exist. Valid aliases: %s." % (wanted, ", ".join(NAMES))
            say("APIServer", "serving.py:274", "Error with model error=ErrorInfo(message='%s', type='NotFoundError', param='model', code=404)" % text, "ERROR")
            return refuse(404, text, "NotFoundError", "model")
        stop_at = begun + float(how.get("warm_delay", 0))
        while time.time() < stop_at and behaviour().get("warm_delay"):     # read again, so that a test can end the delay
            pause(self.sock, 0.05)
        if how.get("mode") == "warm_fails" or DEAD:
            return refuse(500, "EngineCore encountered an issue. See stack trace (above) for the root cause.", "InternalServerError")
        limit = asked.get("max_tokens") or asked.get("max_completion_tokens")
        if isinstance(limit, int) and limit > LENGTH:
            return refuse(400, "max_tokens=%d cannot be greater than max_model_len=%d. Please request fewer output tokens. (parameter=max_tokens, value=%d)"
                          % (limit, LENGTH, limit), "BadRequestError", "max_tokens")
        chat = path.endswith("/chat/completions")
        text = asked.get("prompt") or ""
        if chat:
            for message in asked.get("messages") or []:
                if message.get("role") == "user":
                    text = message.get("content") or ""
        if isinstance(text, list):
            text = "".join(p.get("text", "") if isinstance(p, dict) else str(p) for p in text)
        text = "echo: " + text
        tokens, reason = int(how.get("tokens", 5)), "stop"
        if isinstance(limit, int) and limit < tokens:
            tokens, reason = max(limit, 1), "length"
        delay = float(how.get("token_delay", 0.01))
        prompt = max(1, len(text.split()) - 1)
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + tokens, "completion_tokens": tokens}
        mark = object()
        with LOCK:
            ACTIVE[id(mark)] = record
            COUNT["prompt"] += prompt
            COUNT["requests"] += 1
        done = False
        try:
            name, kind = "%s-%x" % ("chatcmpl" if chat else "cmpl", time.time_ns()), "chat.completion" if chat else "text_completion"
            common = {"id": name, "object": kind, "created": int(begun), "model": NAMES[0]}
            if asked.get("stream"):
                self.stream(asked, chat, common, text, tokens, delay, usage, reason)
            else:
                for _ in range(tokens):
                    pause(self.sock, delay)
                    with LOCK:
                        COUNT["generation"] += 1
                if chat:
                    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None, "tool_calls": [], "reasoning": None}}
                else:
                    choice = {"index": 0, "text": text}
                choice.update({"logprobs": None, "finish_reason": reason, "stop_reason": None})
                self.send(200, dict(common, choices=[choice], usage=usage, system_fingerprint="vllm-%s-rig" % VERSION))
            done = True
        finally:
            with LOCK:
                if ACTIVE.pop(id(mark), None) is not None:
                    COUNT[reason if done else "abort"] += 1
                    COUNT["seconds"] += time.time() - begun
                    note(dict(record, completed=done, aborted=not done, status=200, seconds=time.time() - begun))

    def chunk(self, data):
        self.sock.sendall(b"%x\r\n%s\r\n" % (len(data), data))

    def stream(self, asked, chat, common, text, tokens, delay, usage, reason):
        self.sock.sendall(self.head(200, "text/event-stream; charset=utf-8", ["transfer-encoding: chunked"]))
        if chat:
            common["object"] = "chat.completion.chunk"

        def event(choices, **more):
            self.chunk(b"data: " + json.dumps(dict(common, choices=choices, **more), separators=(",", ":")).encode() + b"\n\n")

        if chat:
            event([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}])
        for i in range(tokens):
            pause(self.sock, delay)
            piece = text[len(text) * i // tokens:len(text) * (i + 1) // tokens]
            with LOCK:
                COUNT["generation"] += 1
            event([dict({"index": 0, "logprobs": None, "finish_reason": reason if i == tokens - 1 else None},
                        **({"delta": {"content": piece}} if chat else {"text": piece}))])
        if (asked.get("stream_options") or {}).get("include_usage"):
            event([], usage=usage)
        self.chunk(b"data: [DONE]\n\n")
        self.sock.sendall(b"0\r\n\r\n")

def metrics():
    label, out, how = 'engine="0",model_name="%s"' % NAMES[0], [], behaviour()

    def metric(name, kind, help, rows):
        out.append("# HELP vllm:%s %s\n# TYPE vllm:%s %s" % (name, help, name, kind))
        out.extend("vllm:%s{%s} %s" % (n, l, float(v)) for n, l, v in rows)

    with LOCK:
        running, c = len(ACTIVE), dict(COUNT)
    metric("num_requests_running", "gauge", "Number of requests in model execution batches.", [("num_requests_running", label, how.get("running", running))])
    metric("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", [("num_requests_waiting", label, how.get("waiting", 0))])
    metric("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", [("kv_cache_usage_perc", label, how.get("kv_usage", 0.01 * running))])
    metric("prompt_tokens", "counter", "Number of prefill tokens processed.", [("prompt_tokens_total", label, c["prompt"])])
    metric("generation_tokens", "counter", "Number of generation tokens processed.", [("generation_tokens_total", label, c["generation"])])
    metric("request_success", "counter", "Count of successfully processed requests.",
           [("request_success_total", 'engine="0",finished_reason="%s",model_name="%s"' % (r, NAMES[0]), c[r]) for r in ("stop", "length", "abort", "error")])
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "inter_token_latency_seconds"):
        n = c["stop"] + c["length"]
        metric(name, "histogram", "Histogram of %s." % name, [(name + "_bucket", 'engine="0",le="%s",model_name="%s"' % (le, NAMES[0]), n) for le in ("60.0", "+Inf")]
               + [(name + "_count", label, n), (name + "_sum", label, c["seconds"])])
    return "\n".join(out) + "\n"

argv = sys.argv[1:]
if argv[:1] in (["--version"], ["-v"]):
    print(VERSION)
    sys.exit(0)
if argv[:1] == ["serve"]:
    argv = argv[1:]
if any(a.split("=")[0] in ("--help", "-h") for a in argv):
    print("usage: vllm serve [model_tag] [options]\n\noptions:\n" + "\n".join("  " + n for n in sorted(VALUED | BOOLS)))
    sys.exit(0)
ARGS, UNKNOWN, POSITIONAL = parse(argv)
MODEL = POSITIONAL[0] if POSITIONAL else ARGS.get("--model", "Qwen/Qwen3-0.6B")
NAMES = ARGS.get("--served-model-name") or [MODEL]
LENGTH = ARGS.get("--max-model-len", 4096)
PORT = ARGS.get("--port", 8000)
KEYS = ARGS.get("--api-key") or ([os.environ["VLLM_API_KEY"]] if os.environ.get("VLLM_API_KEY") else [])
HOST = os.environ.get("SPARK_ADDRESS", "127.0.0.1")
HOW = behaviour()
MODE = HOW.get("mode", "ok")
LOAD = float(HOW.get("load", 0.2))
SHARDS = int(HOW.get("shards", 4))
STARTED = int(time.time())

if MODE == "hang_term":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)

if UNKNOWN:
    time.sleep(LOAD / 2)
    write("usage: vllm [-h] [-v]\n            {chat,complete,serve,launch,bench,collect-env,download-kernels,preload,run-batch,snapshot}\n            ...\n"
          "vllm: error: unrecognized arguments: %s\n" % " ".join(UNKNOWN))
    os._exit(2)

headless = ARGS.get("--headless", False)
if os.environ.get("VLLM_DISABLE_LOG_LOGO") == "1":
    say("APIServer", "startup.py:16", "vLLM server version %s, serving model %s" % (VERSION, MODEL))
else:
    say("APIServer", "api_utils.py:347", "\n       \u2588     \u2588     \u2588\u2584   \u2584\u2588\n \u2584\u2584 \u2584\u2588 \u2588     \u2588     \u2588 \u2580\u2584\u2580 \u2588  version %s\n"
        "  \u2588\u2584\u2588\u2580 \u2588     \u2588     \u2588     \u2588  model   %s\n   \u2580\u2580  \u2580\u2580\u2580\u2580\u2580 \u2580\u2580\u2580\u2580\u2580 \u2580     \u2580\n" % (VERSION, MODEL))
shown = {"model_tag": MODEL, "model": MODEL}
shown.update({k.strip("-").replace("-", "_"): ("***" if k == "--api-key" else v) for k, v in ARGS.items()})
say("APIServer", "api_utils.py:286", "non-default args: %r" % shown)

server = None
if not headless:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((HOST, PORT))       # bound now, listening when ready: connections are refused meanwhile
    except OSError:
        port_in_use()

FAILS = {"missing": 0.05, "free_memory": 0.15, "oom": 0.6, "die": 0.5, "killed": 0.5, "kv": 1.0}
fatal = LOAD * float(HOW.get("at", FAILS[MODE])) if MODE in FAILS else None
begin = time.monotonic()

def until(t):
    # Sleeps to t seconds after the start, or to the hour of death if that is before.
    end = t if fatal is None or MODE == "kv" else min(t, fatal)
    left = begin + end - time.monotonic()
    if left > 0:
        time.sleep(left)
    if fatal is not None and MODE != "kv" and t >= fatal:
        fail(MODE)

until(LOAD * 0.1)
engine = "Worker_TP%d" % ARGS.get("--node-rank", 0) if "--nnodes" in ARGS else "EngineCore"
say("APIServer", "model.py:733", "Resolved architecture: Qwen2ForCausalLM")
say("APIServer", "model.py:2152", "Using max model len %d" % LENGTH)
until(LOAD * 0.2)
say("EngineCore", "core.py:140", "Initializing a V1 LLM engine (v%s) with config: model=%r, speculative_config=None, tokenizer=%r" % (VERSION, MODEL, MODEL))
say(engine, "gpu_model_runner.py:4990", "Starting to load model %s..." % MODEL)
say(engine, "cuda.py:509", "Using FLASHINFER attention backend out of potential backends: ['FLASHINFER', 'TRITON_ATTN']")
say(engine, "weight_utils.py:1145", "Filesystem type for checkpoints: EXT4. Checkpoint size: 61.02 GiB. Available RAM: 112.40 GiB.")

def bar(i, spent):
    rate = "?, ?it/s" if not i else "%02d:%02d, %5.2fs/it" % (spent * (SHARDS - i) // i // 60, spent * (SHARDS - i) // i % 60, spent / i)
    write("\rLoading safetensors checkpoint shards: %3d%% Completed | %d/%d [%02d:%02d<%s]\n" % (100 * i // SHARDS, i, SHARDS, spent // 60, spent % 60, rate))

bar(0, 0)
while MODE == "never_ready":
    for i in range(1, SHARDS):
        time.sleep(max(LOAD / SHARDS, 0.05))
        bar(i, time.monotonic() - begin)
for i in range(1, SHARDS + 1):
    until(LOAD * (0.2 + 0.6 * i / SHARDS))
    bar(i, time.monotonic() - begin)
write("\n")
spent = time.monotonic() - begin
say(engine, "default_loader.py:507", "Loading weights took %.2f seconds" % spent)
say(engine, "gpu_model_runner.py:5089", "Model loading took 61.2 GiB memory and %.6f seconds" % spent)
if headless:
    until(LOAD)
    if MODE in FAILS:
        fail(MODE)
    while True:
        time.sleep(60)
if not ARGS.get("--enforce-eager"):
    say(engine, "backends.py:1010", "Dynamo bytecode transform time: 4.12 s")
    say(engine, "monitor.py:53", "torch.compile took 11.80 s in total")
until(LOAD * 0.9)
if MODE == "kv":
    say(engine, "gpu_worker.py:773", "Available KV cache memory: -1.70 GiB")
    fail(MODE)
say(engine, "gpu_worker.py:773", "Available KV cache memory: 38.91 GiB")
say("EngineCore", "kv_cache_utils.py:1149", "GPU KV cache size: 1,711,646 tokens, Maximum concurrency for %s tokens per request: %.2fx" % (format(LENGTH, ","), 1711646 / max(LENGTH, 1)))
if not ARGS.get("--enforce-eager"):
    write("\rCapturing CUDA graphs (mixed prefill-decode, PIECEWISE): 100%|\u2588\u2588\u2588\u2588\u2588| 7/7 [00:01<00:00,  5.01it/s]\n")
    write("\rCapturing CUDA graphs (decode, FULL): 100%|\u2588\u2588\u2588\u2588\u2588| 4/4 [00:01<00:00,  4.02it/s]\n")
    say(engine, "gpu_model_runner.py:6517", "Graph capturing finished in 3 secs, took 0.61 GiB")
say("EngineCore", "core.py:396", "init engine (profile, create kv cache, warmup model) took 21.08 s (compilation: 11.80 s)")
until(LOAD)
if MODE in FAILS:
    fail(MODE)
say("APIServer", "entry.py:129", "Supported tasks: ['generate']")
say("APIServer", "entry.py:135", "Starting vLLM server on http://%s:%d" % (ARGS.get("--host", "0.0.0.0"), PORT))
say("APIServer", "launcher.py:188", "Available routes are:")
for route, methods in (("/health", "GET"), ("/metrics", "GET"), ("/version", "GET"), ("/v1/models", "GET"), ("/v1/chat/completions", "POST"), ("/v1/completions", "POST")):
    say("APIServer", "launcher.py:195", "Route: %s, Methods: %s" % (route, methods))
if MODE != "silent":
    try:
        server.listen(128)
    except OSError:
        port_in_use()
write("INFO:     Started server process [%d]\nINFO:     Waiting for application startup.\nINFO:     Application startup complete.\n" % ME)
while MODE == "silent":
    time.sleep(60)
while True:
    try:
        sock, peer = server.accept()
    except OSError:
        continue
    threading.Thread(target=Connection(sock, peer).serve, daemon=True).start()
'''

# What Hugging Face has is in ROOT/hub.json, put there by Rig.publish. Behaviour is set by the control files hf_fail and hf_pause.
HF = r'''#!@PYTHON@ -SE
# Stand-in for `hf` of huggingface_hub 2.4, and by its name for `uvx hf` and `huggingface-cli`.
import hashlib, json, os, shutil, sys, time
ROOT = "@ROOT@"
HOME = os.environ["HOME"]
SPARK = ROOT + "/sparks/" + os.environ["RIG_SPARK"]
argv = sys.argv[2:] if os.path.basename(sys.argv[0]) == "uvx" else sys.argv[1:]
hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HF_HOME", HOME + "/.cache/huggingface") + "/hub"
token_file = os.environ.get("HF_HOME", HOME + "/.cache/huggingface") + "/token"
token = os.environ.get("HF_TOKEN") or (open(token_file).read().strip() if os.path.exists(token_file) else "")

def control(name, default=""):
    try:
        return open(SPARK + "/" + name).read().strip() or default
    except FileNotFoundError:
        return default

def fail(text):
    sys.stderr.write("Error: " + text + "\nHint: set HF_DEBUG=1 as environment variable for full traceback.\n")
    sys.exit(1)

with open(SPARK + "/hf.log", "a") as f:
    f.write(json.dumps({"program": os.path.basename(sys.argv[0]), "argv": argv, "token": token, "pid": os.getpid(),
                        "env": {k: v for k, v in os.environ.items() if k.startswith("HF_") and k != "HF_TOKEN"}}) + "\n")
if argv[:2] == ["cache", "rm"]:
    if "--help" in argv:
        sys.exit(0)
    repo = argv[2].partition("/")[2]
    base = argv[argv.index("--cache-dir") + 1] + "/models--" + repo.replace("/", "--")
    for name in os.listdir(base + "/blobs"):
        store = os.path.realpath(base + "/blobs/" + name)
        if os.path.islink(base + "/blobs/" + name):
            users = [l for l in open(store + ".refs").read().split("\n") if l and os.path.islink(l) and not l.startswith(base + "/")]
            if not users:
                os.unlink(store)
                os.unlink(store + ".refs")
    shutil.rmtree(base)
    print("Deleted 1 repo(s) and 1 revision(s)")
    sys.exit(0)
if argv[:1] != ["download"] or len(argv) != 2:
    fail("No such command")
repo, mode, pause = argv[1], control("hf_fail"), float(control("hf_pause", "0"))
known = json.load(open(ROOT + "/hub.json")).get(repo) if os.path.exists(ROOT + "/hub.json") else None
if mode == "network":
    fail("Local entry not found. [Errno -2] Name or service not known")
if mode == "flood":
    for _ in range(3000):
        print("\x1b[31m\u202eno news\x07 " + token * 3 + "x" * 500)
if known is None:
    fail("Model '%s' not found.\nIf the repo is private, make sure you are authenticated and your token has the required permissions." % repo)
if known["gated"] and token != known["gated"]:
    fail("Access denied. Model '%s' requires approval." % repo)
base = hub + "/models--" + repo.replace("/", "--")
rev = hashlib.sha1(repo.encode()).hexdigest()
for d in ("blobs", "refs", "snapshots/" + rev):
    os.makedirs(base + "/" + d, exist_ok=True)
open(base + "/refs/main", "w").write(rev)
for n, (name, size) in enumerate(known["files"].items()):
    data = open(ROOT + "/hub/" + repo + "/" + name, "rb").read()
    etag = hashlib.sha256(data).hexdigest()
    blob = base + "/blobs/" + etag
    if not os.path.exists(blob):
        part = "%s.%08x.incomplete" % (blob, os.getpid())
        with open(part, "wb") as f:
            for i in range(0, len(data), max(1, len(data) // 10)):
                f.write(data[i:i + max(1, len(data) // 10)])
                f.flush()
                if name.endswith("safetensors"):
                    if control("hf_fail") == "disk":
                        fail("[Errno 28] No space left on device")
                    time.sleep(float(control("hf_pause", "0")))
        os.rename(part, blob)
    link = base + "/snapshots/" + rev + "/" + name
    if not os.path.islink(link) and not (mode == "short" and name.endswith("safetensors")):
        os.symlink("../../blobs/" + etag, link)
print("Downloaded\n  path: " + base + "/snapshots/" + rev)
'''

HF_DOWNLOAD = r'''#!/usr/bin/env bash
# Stand-in for the launcher's hf-download.sh (eugr/spark-vllm-docker@065fb92), without its copying.
set -e
[ -n "$1" ] || { echo "Error: Model name is required."; exit 1; }
if ! command -v uvx &> /dev/null; then echo "Error: 'uvx' command not found."; exit 1; fi
echo "Downloading model '$1' using uvx..."
if uvx hf download "$1"; then printf "Download completed in 00:00:01\n"; else echo "Error: Failed to download model '$1'."; exit 1; fi
echo "No host specified, skipping copy."
echo "Done downloading $1."
'''

RSYNC = r'''#!@PYTHON@ -SE
# Stand-in for rsync 3.2 over ssh: what sparkctl asks of it, with its rule for unsafe links and its order of files.
import fnmatch, json, os, subprocess, sys, time
ROOT = "@ROOT@"
SPARK = ROOT + "/sparks/" + os.environ["RIG_SPARK"]
options = [a for a in sys.argv[1:] if a.startswith("-")]
words = [a for a in sys.argv[1:] if not a.startswith("-")]
ssh = words.pop(0).split() if "-e" in options else ["ssh"]
source, target = words

def control(name, default=""):
    try:
        return open(SPARK + "/" + name).read().strip() or default
    except FileNotFoundError:
        return default

def reach(place):
    if ":" not in place:
        return place
    login, _, path = place.partition(":")
    said = {"hostkey": "Host key verification failed.", "denied": "root@%s: Permission denied (publickey,password)." % login}.get(control("rsync_fail"))
    if said:
        sys.stderr.write(said + "\r\nrsync: connection unexpectedly closed (0 bytes received so far) [sender]\n")
    got = subprocess.run(["false"] if said else [*ssh, login, "true"], stdin=subprocess.DEVNULL)
    if control("rsync_fail") == "missing":
        sys.stderr.write("bash: line 1: rsync: command not found\nrsync: connection unexpectedly closed (0 bytes received so far) [sender]\n"
                         "rsync error: error in rsync protocol data stream (code 12) at io.c(232) [sender=3.2.7]\n")
        sys.exit(12)
    if got.returncode:
        sys.stderr.write("rsync error: unexplained error (code 255) at io.c(232) [sender=3.2.7]\n")
        sys.exit(255)
    return path

def unsafe(link, at):       # rsync's util1.c, unsafe_symlink
    depth = at.count("/")
    for part in link.split("/")[:-1]:
        depth += -1 if part == ".." else part not in (".", "")
        if depth < 0:
            return True
    return link.startswith("/")

with open(SPARK + "/rsync.log", "a") as f:
    f.write(json.dumps({"argv": sys.argv[1:]}) + "\n")
excluded = [a.partition("=")[2] for a in options if a.startswith("--exclude")]
tree, into = reach(source), reach(target)
if not tree.endswith("/"):
    tree, into = os.path.dirname(tree), into + "/"
os.makedirs(into, exist_ok=True)
for folder, folders, files in os.walk(tree):
    folders.sort()
    for name in sorted(files):
        path = os.path.join(folder, name)
        at = os.path.relpath(path, tree)
        if any(fnmatch.fnmatch(name, e) for e in excluded):
            continue
        new = os.path.join(into, at)
        os.makedirs(os.path.dirname(new), exist_ok=True)
        if os.path.islink(path) and not ("--copy-unsafe-links" in options and unsafe(os.readlink(path), at)):
            if not os.path.islink(new):
                os.symlink(os.readlink(path), new)
            continue
        data = open(path, "rb").read()
        if os.path.exists(new) and os.path.getsize(new) == len(data):
            continue
        part = os.path.join(os.path.dirname(new), "." + name + ".Xy12Zq")
        with open(part, "wb") as f:
            for i in range(0, len(data), max(1, len(data) // 10)):
                f.write(data[i:i + max(1, len(data) // 10)])
                f.flush()
                if len(data) > 500:
                    time.sleep(float(control("rsync_pause", "0")))
                if control("rsync_fail") == "cut":
                    os.unlink(SPARK + "/rsync_fail")
                    sys.stderr.write("client_loop: send disconnect: Broken pipe\nrsync error: unexplained error (code 255) at io.c(232) [sender=3.2.7]\n")
                    sys.exit(255)
        os.rename(part, new)
'''


class Rig:
    """Sparks below tmp_path. Every process of theirs carries RIG_ROOT, so close() finds them all."""

    def __init__(self, tmp_path, sparks=None):
        self.root = Path(tmp_path).resolve() / "rig"
        self.sparks = dict(sparks or {"spark1": "127.0.0.1", "spark2": "127.0.0.2"})
        self.bin = self.root / "bin"
        self.bin.mkdir(parents=True)
        self._children = []
        self._write_json(self.root / "sparks.json", self.sparks)
        self._program(self.bin / "ssh", SSH)
        for name in self.sparks:
            spark = self.spark(name)
            (spark / "docker").mkdir(parents=True)
            (spark / "home" / "spark-vllm-docker").mkdir(parents=True)
            (spark / "bin").mkdir()
            for program, text in (("ssh", SSH), ("docker", DOCKER), ("vllm", VLLM), ("nvidia-smi", NVIDIA_SMI), ("journalctl", JOURNALCTL), ("uvx", HF), ("rsync", RSYNC)):
                self._program(spark / "bin" / program, text)
            for alias in ("pgrep", "pkill", "killall"):     # the system's own would hit every test run on this machine
                (spark / "bin" / alias).symlink_to("docker")
            if not Path("/usr/bin/python3").exists():
                (spark / "bin" / "python3").symlink_to(sys.executable)
            self.install_launcher(name, LAUNCHER)
            self._program(spark / "home" / "spark-vllm-docker" / "hf-download.sh", HF_DOWNLOAD)
            self.cluster(name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @staticmethod
    @functools.cache
    def _compiled(text):
        return marshal.dumps(compile(text.replace('ROOT = "@ROOT@"\n', ""), "rig", "exec"))

    def _program(self, path, text):
        if text.startswith("#!@PYTHON@"):           # compiled once: a docker that is asked thirty times a swap would spend half its time on that
            code = path.with_name(f".{path.name}.code")
            code.write_bytes(self._compiled(text))
            text = f'#!@PYTHON@ -SE\nimport marshal\nROOT = "@ROOT@"\nwith open("{code}", "rb") as f:\n    code = marshal.loads(f.read())\nexec(code)\n'
        new = path.with_name(path.name + ".new")    # replaced at once: an old one may be running
        new.write_text(text.replace("@PYTHON@", sys.executable).replace("@ROOT@", str(self.root)))
        new.chmod(0o755)
        new.rename(path)

    @staticmethod
    def _write_json(path, value):
        new = path.with_name("." + path.name + ".new")
        new.write_text(json.dumps(value))
        new.rename(path)

    def spark(self, name):
        return self.root / "sparks" / name

    def install_launcher(self, spark, text):
        self._program(self.spark(spark) / "home" / "spark-vllm-docker" / "launch-cluster.sh", text)

    def cluster(self, spark, *names, text=None):
        """CLUSTER_NODES in the launcher's .env: this Spark first, then the others. text replaces the whole file, "" removes it."""
        path = self.spark(spark) / "home" / "spark-vllm-docker" / ".env"
        if text is None:
            others = names or [n for n in self.sparks if n != spark]
            text = "CLUSTER_NODES=" + ",".join(self.sparks[n] for n in [spark, *[o for o in others if o != spark]]) + "\n"
        if text:
            path.write_text(text)
        else:
            path.unlink(missing_ok=True)

    # --- faults and behaviour

    def control(self, spark, name, value=""):
        new = self.spark(spark) / f".{name}.new"
        new.write_text(str(value))
        new.rename(self.spark(spark) / name)

    def clear(self, spark, *names):
        for name in names:
            (self.spark(spark) / name).unlink(missing_ok=True)

    def behave(self, spark, model, **behaviour):
        """Merges into what is set for this name; without any behaviour forgets it. "*" is the default for all models."""
        path = self.spark(spark) / "vllm.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        if behaviour:
            known[model] = {**known.get(model, {}), **behaviour}
        else:
            known.pop(model, None)
        self._write_json(path, known)

    # --- what happened

    @staticmethod
    def _lines(path):
        try:
            return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]      # the last may be being written
        except FileNotFoundError:
            return []

    def calls(self, spark=None):
        found = self._lines(self.root / "ssh.log")
        return [c for c in found if spark is None or c["spark"] == spark]

    def requests(self, spark):
        return self._lines(self.spark(spark) / "requests.log")

    def _processes(self, *marks):
        """Pids whose environment holds all the marks (a zombie's is empty, so those do not count)."""
        wanted = [b"\0" + m.encode() + b"\0" for m in marks]
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                try:
                    data = b"\0" + Path("/proc", name, "environ").read_bytes()
                except OSError:
                    continue
                if all(w in data for w in wanted):
                    found.append(int(name))
        return sorted(found)

    def engines(self, spark, container=None, foreign=False):
        """Live fake vLLMs as (pid, argv); strangers only with foreign=True."""
        marks = [f"RIG_ROOT={self.root}", f"RIG_SPARK={spark}"]
        if container:
            meta = self.container(spark, container)
            if not meta:
                return []
            marks.append("RIG_CONTAINER=" + meta["id"])
        program, found = str(self.spark(spark) / "bin" / "vllm"), []
        strangers = set(self._processes(*marks, "RIG_FOREIGN=1"))
        for pid in self._processes(*marks):
            try:
                argv = Path("/proc", str(pid), "cmdline").read_bytes().decode().rstrip("\0").split("\0")
            except OSError:
                continue
            if program in argv[:4] and (pid in strangers) == foreign:
                found.append((pid, ["vllm", *argv[argv.index(program) + 1:]]))
        return found

    def containers(self, spark):
        """Names of running containers."""
        found = []
        for path in sorted((self.spark(spark) / "docker").iterdir()):
            if not path.name.startswith(".") and (path / "meta.json").exists() and not (path / "exited").exists():
                found.append(path.name)
        return found

    def container(self, spark, name):
        try:
            return json.loads((self.spark(spark) / "docker" / name / "meta.json").read_text())
        except FileNotFoundError:
            return None

    def logs(self, spark, name):
        """The container's log with time stamps, or "" when it is gone."""
        try:
            return (self.spark(spark) / "docker" / name / "log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # --- things that happen to a Spark

    def env(self, spark):
        home = self.spark(spark)
        return {"HOME": str(home / "home"), "USER": "root", "LANG": "C.UTF-8", "PATH": f"{home}/bin:/usr/bin:/bin",
                "RIG_ROOT": str(self.root), "RIG_SPARK": spark, "SPARK_ADDRESS": self.sparks[spark]}

    def sh(self, spark, command, timeout=20, **more_env):
        """A command on the Spark itself, without ssh."""
        return subprocess.run(["/bin/sh", "-c", command], env={**self.env(spark), **more_env}, cwd=self.spark(spark) / "home",
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout)

    def kill_engine(self, spark, container="vllm_node", sig=signal.SIGKILL):
        pids = [pid for pid, _ in self.engines(spark, container)]
        for pid in pids:
            try:
                os.kill(pid, sig)
            except ProcessLookupError:
                pass
        return pids

    def remove_container(self, spark, name):
        """Gone at once, whatever faults are set."""
        self.sh(spark, 'docker rm -f "$NAME"', NAME=name, RIG_FORCE="1")

    def free_port(self, spark):
        """One that the kernel gives to no client meanwhile, so that an engine finds it free each time it starts."""
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        while True:
            port = random.randrange(first // 2, first)
            with socket.socket() as s, contextlib.suppress(OSError):
                s.bind((self.sparks[spark], port))
                return port

    def start_foreign(self, spark, port, model_id, **behaviour):
        """A stranger's server on the Spark, listening when this returns. Returns the Popen."""
        env = {**self.env(spark), "RIG_FOREIGN": "1", "RIG_BEHAVIOUR": json.dumps({"load": 0, **behaviour})}
        child = subprocess.Popen([str(self.spark(spark) / "bin" / "vllm"), "serve", model_id, "--port", str(port)], env=env,
                                 stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        self._children.append(child)
        until = time.monotonic() + 5
        while time.monotonic() < until and child.poll() is None:
            with socket.socket() as s:
                if s.connect_ex((self.sparks[spark], port)) == 0:
                    return child
            time.sleep(0.01)
        raise RuntimeError(f"the stranger on {spark}:{port} does not listen")

    def parser(self, spark, **changed):
        """Give the Spark's images a vLLM whose parser can be asked; changed: files of it."""
        for name, text in {**PARSER_PACKAGE, **changed}.items():
            path = self.spark(spark) / "image" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    # --- weights

    @staticmethod
    def _files(shards, size):
        names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        files = {"config.json": json.dumps({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 4096,
                                            "torch_dtype": "bfloat16"}).encode(),
                 "model.safetensors.index.json": json.dumps({"metadata": {"total_size": size * shards}, "weight_map": {
                     f"model.layers.{i}.weight": name for i, name in enumerate(names)}}).encode()}
        for i, name in enumerate(names):
            head = json.dumps({f"model.layers.{i}.weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
            files[name] = len(head).to_bytes(8, "little") + head + bytes(size)
        return files, names[-1]

    def publish(self, repo, shards=2, size=100_000, gated=""):
        """Let Hugging Face have a repo; gated: the token that may read it."""
        files, _ = self._files(shards, size)
        place = self.root / "hub" / repo
        place.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (place / name).write_bytes(data.replace(bytes(8), repo.encode().ljust(8)[:8], 1))       # different in each repo
        path = self.root / "hub.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        self._write_json(path, {**known, repo: {"gated": gated, "files": {name: len(data) for name, data in files.items()}}})

    def tool(self, spark, name, text=None):
        """Install `hf` or the like on a Spark; "" takes it away."""
        if text == "":
            (self.spark(spark) / "bin" / name).unlink()
        else:
            self._program(self.spark(spark) / "bin" / name, text or HF)

    def hub(self, spark, repo=""):
        base = self.spark(spark) / "home/.cache/huggingface/hub"
        return base / ("models--" + repo.replace("/", "--")) if repo else base

    def weights(self, spark, model, shards=2, complete=True, size=1000, shared=False):
        """A Hugging Face cache entry; incomplete: the last shard has no link and its blob is a leftover; shared: shards lie in the store of 2.x,
        which _files makes the same for every model. Returns the snapshot."""
        import hashlib
        base = self.hub(spark, model)
        revision = hashlib.sha1(model.encode()).hexdigest()
        snapshot = base / "snapshots" / revision
        for folder in (base / "blobs", base / "refs", snapshot):
            folder.mkdir(parents=True, exist_ok=True)
        (base / "refs" / "main").write_text(revision)
        files, last = self._files(shards, size)
        for name, data in files.items():
            digest = (hashlib.sha256 if name.endswith(".safetensors") else hashlib.sha1)(name.encode() + data).hexdigest()
            if name == last and not complete:
                (base / "blobs" / f"{digest}.0a1b2c3d.incomplete").write_bytes(data[: len(data) // 2])
                continue
            if shared and name.endswith(".safetensors"):
                store = self.hub(spark) / "blobs" / digest[:2] / digest
                store.parent.mkdir(parents=True, exist_ok=True)
                (self.hub(spark) / "blobs" / ".huggingface-shared-blobs").write_text("1\n")
                store.write_bytes(data)
                (base / "blobs" / digest).unlink(missing_ok=True)
                (base / "blobs" / digest).symlink_to(f"../../blobs/{digest[:2]}/{digest}")
                with open(f"{store}.refs", "a") as f:
                    f.write(f"{base}/blobs/{digest}\n")
            else:
                (base / "blobs" / digest).write_bytes(data)
            link = snapshot / name
            link.unlink(missing_ok=True)
            link.symlink_to(f"../../blobs/{digest}")
        return snapshot

    def local_model(self, spark, path, shards=2, complete=True, size=1000):
        """A model in a plain folder below the Spark's directory. Returns its path."""
        folder = self.spark(spark) / str(path).lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        files, last = self._files(shards, size)
        for name, data in files.items():
            if complete or name != last:
                (folder / name).write_bytes(data)
        return folder

    # --- the end

    def _mine(self):
        """Ours by environment; ssh clients that a test started are known by their program."""
        found = set(self._processes(f"RIG_ROOT={self.root}"))
        program = os.fsencode(self.bin / "ssh")
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    if program in Path("/proc", name, "cmdline").read_bytes().split(b"\0")[:4]:
                        found.add(int(name))
                except OSError:
                    pass
        return found - {os.getpid(), os.getppid()}

    def close(self):
        until, quiet = time.monotonic() + 10, 0
        while quiet < 2 and time.monotonic() < until:     # twice nobody: one may have been forking while we looked
            mine = self._mine()
            quiet = 0 if mine else quiet + 1
            for pid in mine:
                try:
                    os.kill(pid, signal.SIGKILL)
                except OSError:
                    pass
            for child in self._children:
                child.poll()
            time.sleep(0.01)
        if quiet < 2:
            raise RuntimeError(f"still alive: {sorted(self._mine())}")
