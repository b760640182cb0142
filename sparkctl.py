#!/usr/bin/env python3
"""sparkctl - one address and one arbiter for the GPUs of your NVIDIA DGX Sparks.

It knows a catalog of models, swaps what vLLM serves over ssh, tells the truth about every step, and gives
applications one stable OpenAI-compatible address. It is a control plane: it runs no jobs of yours, stores no
prompts, and never starts a model that nobody asked for.

    python3 sparkctl.py                 serve the page and the API on 127.0.0.1:9999
    python3 sparkctl.py --demo          the same with two pretended Sparks; needs no hardware
    python3 sparkctl.py check           print settings, catalog, slots and services with every problem (exit 0/1/2)
    python3 sparkctl.py import-recipe   turn spark-vllm-docker's recipes into models (FILE… [--write])

Contents (each section uses only names from the sections above it; a test proves it)
   1  settings       one table: name, default, parser, help; environment > settings.yaml > default
   2  small helpers  refusals, clock, quoting, atomic files
   3  hosts          the only subprocess: ssh, its failures told apart
   4  catalog        models.yaml + overrides -> frozen ModelDef records
   5  services       slots, backends and services from services-overrides.yaml; the files are read again, and edited
   6  backends       what is run on a Spark: pure builders of shell text, every value through quote_arg
   7  engine         what a vLLM says: its HTTP answers, its log lines
   8  swap rules     phases, the one table of transitions, the lease, invariants, checks: pure
   9  swap           the Arbiter, who says yes or no, and SwapManager's worker, who acts
  10  coordination   events, webhooks, cron, schedules of others, jobs of our own
  11  weights        what is on the Sparks' disks: list, download, copy, delete
  12  monitor        who watches Sparks, slots and services; history and metrics
  13  data path      /v1: which slot, hold while it swaps, relay bytes as they come
  14  http           routes, guards, long-poll
  15  demo           a pretended engine, run by the very same swap code
  16  command line

Threads: the main thread waits for a signal; `accept` takes connections, one thread each; `swap` performs the
running swap, alone, with a short-lived pool for Sparks asked at once; `lease` ends the lock on time; `jobs` starts
what is due, in a thread `job` each; `webhook` delivers, one a receiver; `config` re-reads the YAML files; `spark-NAME`,
`slot-NAME` and `service-NAME` poll, one each, so that a dead one delays only itself; `history` keeps what they saw;
`weights-NAME` looks after the transfer that begins at that Spark; `follow` reads an engine's log during a swap; `access`
counts and logs what was answered.
Locks: Arbiter._lock guards the one decision who may start what, and is held until the journal has it; Hub.changed the
version that long-polls wait on; Gate._lock the holding and counting of requests; Activity._lock the counters and last
requests; Events._lock, SwapLog._lock and Register._lock a list and its file; Webhooks._lock deliveries and queues;
Jobs._lock which jobs run; Monitor._lock what the slots' polls last saw; History._lock what was measured; ConfigStore._lock
reading and editing the YAML files; Hosts._lock the resolved addresses; Server._lock the count of replies in flight, of
connections and of bytes of bodies. No lock is held across ssh, HTTP or sleep, and no two at once. What is
published is immutable and replaced whole: readers take no lock.
Trusted: the two YAML files, the environment, the user that ssh logs in as. Not trusted: clients, web pages in
the owner's browser, what an engine or a Spark answers.
"""
import argparse
import base64
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import fcntl
import fnmatch
import functools
import hashlib
import hmac
import http.client
import io
import ipaddress
import itertools
import json
import math
import mmap
import os
import queue
import re
import resource
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, NamedTuple

try:
    import yaml
except ImportError:
    sys.exit("sparkctl needs PyYAML: run `sudo apt-get install -y python3-yaml` (Debian, Ubuntu, DGX OS) "
             f"or `{sys.executable} -m pip install PyYAML`")

VERSION = "0.1.0"
HERE = os.path.dirname(os.path.abspath(__file__))
GIB = 1 << 30

# === 1 settings ===============================================================
# One row per setting. The environment, <data>/settings.yaml, `check`, the page and README's table all come from
# here. A blank value means the default; a bad one falls back to the default and is reported, never fatal.


def require(ok, message):
    """The one check of every parser: a ValueError with the message, unless ok."""
    if not ok:
        raise ValueError(message)


def text(value):
    """Any single line of text."""
    value.encode()                              # lone surrogates: UnicodeEncodeError is a ValueError
    require(not re.search(r"[\x00-\x1f\x7f]", value), "must not contain control characters")
    return value


def number(low, high, kind=float):
    """A parser of texts that are numbers from low to high."""
    def parse(value):
        with contextlib.suppress(ValueError):
            if low <= kind(value) <= high:
                return kind(value)
        raise ValueError(f"must be a {'whole ' if kind is int else ''}number from {low} to {high}")
    return parse


def matching(pattern, message):
    """A parser of texts that the pattern matches whole."""
    def parse(value):
        require(isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII), message)
        return value
    return parse


def flag(value):
    """on/off, true/false, yes/no, 1/0."""
    on = value.lower() in ("on", "true", "yes", "1")
    require(on or value.lower() in ("off", "false", "no", "0"), "must be on or off")
    return on


def names(value):
    """A comma-separated list; blanks are dropped."""
    return tuple(part.strip() for part in text(value).split(",") if part.strip())


def urls(value):
    """A comma-separated list of http or https addresses."""
    for place in map(urllib.parse.urlsplit, names(value)):
        require(place.scheme in ("http", "https") and place.hostname and place.port != 0 and re.fullmatch("[!-~]+", value.replace(", ", ",")),
                "must be addresses that start with http:// or https://")
    return names(value)


def one_url(value):
    require("," not in value and len(urls(value)) == 1, "must be one address")
    return urls(value)[0]


def abs_paths(value):
    for path in names(value):
        require(path.startswith("/") and os.path.normpath(path) == path, f"{path!r} is not an absolute, normalised path")
    return names(value)


# A host for ssh: a name, an ssh alias, an address, or `local`. Charset-checked although it follows `--`.
host_name = matching(r"([A-Za-z0-9_][A-Za-z0-9_.:-]{0,252})?", "must be a host name, an address or an ssh alias (letters, digits, . _ : -)")
user_name = matching(r"([A-Za-z_][A-Za-z0-9_.-]{0,63})?", "must be a login name (letters, digits, . _ -)")
# Docker's own rule for names, https://docs.docker.com/reference/cli/docker/container/run/#name.
container_name = matching(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", "must be a container name (letters, digits, . _ -)")


class Setting(NamedTuple):
    name: str
    default: str
    parse: Callable
    help: str
    secret: bool = False        # never returned, logged, or put on a command line
    restart: bool = False       # read once: a change counts at the next start
    guarded: bool = False       # decides what runs, what is written where, or who may ask: strangers may not change it


PORT, SECONDS = number(1, 65535, int), number(0, 86400)
SETTINGS = (
    Setting("SPARKCTL_BIND", "127.0.0.1", text, "address to listen on; loopback unless you say otherwise", restart=True, guarded=True),
    Setting("SPARKCTL_PORT", "9999", number(0, 65535, int), "port to listen on (0 = any free one)", restart=True, guarded=True),
    Setting("SPARKCTL_DATA", "data", text, "directory for state; relative to the script (environment or --data only)",
            restart=True, guarded=True),
    Setting("SPARKCTL_API_KEY", "", text, "key that clients send as `Authorization: Bearer …`; blank = no key", True, guarded=True),
    Setting("SPARKCTL_ALLOWED_HOSTS", "", names, "further Host names to answer to, besides IP addresses, localhost, "
            "this machine's names and *.local", guarded=True),
    Setting("VLLM_API_KEY", "", text, "key sent to the engines", True, guarded=True),
    *(Setting(f"SPARK{n}_{part}", "", parse, help_text, restart=True, guarded=True) for n in range(1, 9) for part, parse, help_text in (
        ("HOST", host_name, f"Spark {n}: host name, address or ssh alias; `local` = this machine, without ssh"),
        ("USER", user_name, f"Spark {n}: ssh user; blank = whatever ssh chooses"))),
    Setting("LAUNCH_DIR", "~/spark-vllm-docker", text, "directory of launch-cluster.sh on the Sparks", guarded=True),
    Setting("VLLM_PORT", "8888", PORT, "port that the engine of slot main listens on", guarded=True),
    Setting("VLLM_CONTAINER", "vllm_node", container_name, "container that the engine of slot main runs in", guarded=True),
    Setting("DISABLED_SERVICES", "", names, "services without a tile or probe, comma-separated"),
    Setting("MODELS_OVERRIDES", "", text, "file whose knobs, models and hidden models go on top of "
            "models.yaml; blank = models-overrides.yaml in the data directory", restart=True, guarded=True),
    Setting("LOCAL_MODEL_ROOTS", "/home,/data,/models,/mnt,/srv", abs_paths, "directories that local models may be below", guarded=True),
    Setting("SWAP_DRAIN_SECONDS", "30", SECONDS, "longest wait for requests in flight before an engine is stopped"),
    Setting("SWAP_STOP_TIMEOUT", "120", number(1, 3600), "longest time for an engine to stop and give its memory back, seconds"),
    Setting("SWAP_LAUNCH_TIMEOUT", "300", number(1, 3600), "longest time for the launcher, seconds"),
    Setting("SWAP_LOAD_TIMEOUT", "1800", number(1, 86400), "longest time for a model to load, seconds"),
    Setting("SWAP_ANSWER_TIMEOUT", "60", number(1, 3600), "longest time from the engine's word that it is up to its first answer, seconds"),
    Setting("SWAP_WARM_TIMEOUT", "300", number(1, 3600), "longest time for an engine's first answer to a prompt, seconds"),
    Setting("SWAP_ROLLBACK", "on", flag, "launch the previous model again when a swap fails after the stop"),
    Setting("MIN_SERVING_SECONDS", "120", SECONDS, "shortest time that a model serves before a job or AUTO_SWAP may replace it; people and holders of the lock may at any time"),
    Setting("WEBHOOK_URL", "", urls, "where events are POSTed, comma-separated", True, guarded=True),
    Setting("WEBHOOK_SECRET", "", text, "key of the signature X-Spark-Signature; blank = unsigned", True, guarded=True),
    Setting("WEBHOOK_EVENTS", "swap_complete,swap_failed", names, "events that are POSTed, comma-separated; * at the end of a name stands for anything: lock_*"),
    Setting("HOLD_SECONDS", "60", SECONDS, "longest time a /v1 request is held while its slot swaps"),
    Setting("AUTO_SWAP", "off", flag, "a /v1 request for a model of the catalog that is not served starts the swap to it, and is held"),
    Setting("MAX_BODY_MB", "32", number(1, 1024, int), "largest body of a /v1 request, MiB, and of others 2 at most; all that are being read at a time may have eight times as much", guarded=True),
    Setting("MAX_UPLOAD_MB", "512", number(1, 1 << 20, int), "largest upload to /v1/audio, MiB; it is passed on as it comes", guarded=True),
    Setting("POLL_SECONDS", "5", number(1, 3600), "time between two looks at a Spark, a slot or a service"),
    Setting("QDRANT_API_KEY", "", text, "key that Qdrant is asked with", True, guarded=True),
    Setting("OPEN_WEBUI_URL", "", lambda value: value and one_url(value),
            "address of Open WebUI, if it is not a service with a host and a port", guarded=True),
)
SETTING = {s.name: s for s in SETTINGS}
PINNED = ("command line", "environment")        # where a setting comes from that settings.yaml cannot change
SECRETS = tuple(s.name for s in SETTINGS if s.secret)


class Settings(NamedTuple):
    """An immutable snapshot: parsed values, where each came from, and what was wrong."""
    values: dict
    sources: dict               # name -> command line | environment | file | default
    warnings: tuple             # sentences; never contain a secret's value

    def __getitem__(self, name):
        return self.values[name]

    def public(self):
        """Rows for the page and the API; a secret shows only whether it is set."""
        return [{"name": s.name, "value": ("set" if self[s.name] else "") if s.secret else
                 ",".join(self[s.name]) if isinstance(self[s.name], tuple) else self[s.name],
                 "source": self.sources[s.name], "help": s.help, "secret": s.secret, "default": s.default,
                 "pinned": self.sources[s.name] in PINNED, "restart": s.restart} for s in SETTINGS]


def setting_text(raw):
    """A value as YAML or JSON gives it -> the text that the environment would give."""
    raw = {None: "", True: "on", False: "off"}[raw] if raw is None or isinstance(raw, bool) else f"{raw:.15g}" if isinstance(raw, float) else raw
    return ",".join(map(str, raw)) if isinstance(raw, (list, tuple)) else str(raw).strip()


def parse_settings(env, file_values=None, flags=None, file_label="settings.yaml"):
    """Three mappings of texts -> Settings. Never raises: a bad value becomes a warning and the next source counts."""
    values, sources, warnings = {}, {}, []
    file_values = file_values or {}
    ours = re.compile(r"SPARKCTL_(?!DEMO_PID)|SPARK_?\d|SWAP_")         # VLLM_… are vLLM's own as well
    for label, found in ((file_label, file_values), ("environment", filter(ours.match, env))):
        for name in sorted(set(map(str, found)) - set(SETTING)):
            close = difflib.get_close_matches(name, SETTING, n=1)
            warnings.append(f"{label}: {name[:80]} is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
    for s in SETTINGS:
        values[s.name], sources[s.name] = s.parse(s.default), "default"
        for label, place in (("command line", flags or {}), ("environment", env), ("file", file_values)):
            raw = setting_text(place.get(s.name))
            if label == "file" and s.name == "SPARKCTL_DATA" and raw:
                warnings.append(f"{file_label}: SPARKCTL_DATA says where this file is, so it cannot stand in it")
                continue
            try:
                if raw:
                    values[s.name], sources[s.name] = s.parse(raw), label
                    break
            except ValueError as e:
                shown = "its value" if s.secret else repr(raw[:200])
                why = str(e) if str(e).startswith(("must", repr(raw)[:3])) else "is not valid"
                warnings.append(f"{s.name}: {shown} from the {label} {why}; using the next source")
    return Settings(values, sources, tuple(warnings))


# === 2 small helpers ==========================================================
# Refusals carry their HTTP status; section 14 turns them into {"error": {...}}. Files are written whole or not at all.


class Refused(Exception):
    """A request that we will not do. str(e) is shown to the caller, so it never holds a secret."""

    def __init__(self, status, code, message, headers=(), **details):
        super().__init__(message)
        self.status, self.code, self.headers, self.details = status, code, dict(headers), details

    def body(self):
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "code": self.code, **self.details}}


class Problem(NamedTuple):
    """Something wrong in a file, precise enough to mend it."""
    file: str
    entry: str
    field: str
    message: str

    def __str__(self):
        return ": ".join(p for p in (self.file, ".".join(p for p in (self.entry, self.field) if p), self.message) if p)


def utc(seconds=None):
    """RFC 3339 in UTC with milliseconds, of a Unix time or of now."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_utc(text_):
    """RFC 3339 -> Unix time. Raises ValueError, also for a time without its zone."""
    at = datetime.fromisoformat(re.sub(r"[zZ]$", "+00:00", text_))
    require(at.tzinfo, "a time needs its zone")
    return at.timestamp()


def boot_clock():
    """Seconds that nobody can set, going on in suspend, from the same zero for every program of this boot."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


@functools.cache
def boot_id():
    """Which boot this is; "" where the system does not tell."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as f:
        return f.read().strip()
    return ""


def quote_arg(value):
    """The one way a value reaches a shell: as exactly one argument. Raises ValueError for a NUL, which no argv can carry."""
    require("\0" not in str(value), "a NUL character cannot be passed to a program")
    str(value).encode()                           # lone surrogates: UnicodeEncodeError is a ValueError
    return shlex.quote(str(value))


def quote_all(values):
    return " ".join(map(quote_arg, values))


def quote_path(path):
    """Like quote_arg, for a path on the Spark whose leading ~/ means that user's home."""
    home, _, rest = path.partition("/")
    return '"$HOME"/' + quote_arg(rest) if home == "~" else quote_arg(path)


def printable(line, limit=4000):
    """Text from outside made safe for terminals, logs and JSON: bounded, no control characters, nothing that turns text around, valid Unicode."""
    line = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line[:2 * limit])
    line = re.sub("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\ufffd", line)
    return line.replace("\t", " ")[:limit]


def to_json(value):
    """UTF-8 bytes; a lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")


def nearest(word, known):
    """The most similar known word, or None: for `did you mean`."""
    return next(iter(difflib.get_close_matches(str(word)[:100], list(known), n=1)), None)


def entry_of(entries, what, name, **details):
    """entries[name]. Raises Refused 404 with the nearest name that there is."""
    if name in entries:
        return entries[name]
    hint, where = nearest(name, entries), {"model": "models?hidden=true", "service": "services", "schedule": "schedule", "job": "jobs"}.get(what, "state")
    message = f"there is no {what} {printable(name, 80)}; " + (f"did you mean {hint}? " if hint else "") + f"GET /api/{where} lists all"
    raise Refused(404, "unknown_" + what, message, nearest=hint, **details)


def checked(given, fields, where):
    """given through its parsers. Raises Refused 422 that names the field, and the nearest known one."""
    got = {}
    for name, value in given.items():
        if name not in fields:
            hint = nearest(name, fields)
            raise Refused(422, "unknown_field", f"{where} has no field {printable(str(name), 80)}" + (f"; did you mean {hint}?" if hint else ""),
                          field=str(name)[:80], known=sorted(fields))
        try:
            got |= {} if value is None else {name: fields[name](value)}
        except (ValueError, TypeError, RecursionError) as e:
            raise Refused(422, "bad_field", f"{name} {e}", field=name) from None
    return got


def needed(given, *fields):
    if missing := [name for name in fields if name not in given]:
        raise Refused(422, "bad_field", f"{missing[0]} is needed: send it", field=missing[0])


def choice(*words):
    return matching("|".join(words), f"must be one of {', '.join(words)}")


def retry_after(seconds, most=math.inf):
    """The header of a refusal: when to ask again."""
    return {"Retry-After": str(min(most, max(1, math.ceil(seconds))))}


def line_of(most):
    def parse(value):
        good = isinstance(value, str) and 0 < len(value) <= most and printable(value, most) == value
        require(good, f"must be text of 1 to {most} characters on one line")
        return value
    return parse


def amount(low, high, unit):
    def parse(value):
        require(isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high, f"must be {unit} from {low} to {high}")
        return value
    return parse


def boolean(value):
    require(isinstance(value, bool), "must be a bool")
    return value


def write_atomic(path, data):
    """Write bytes to a temporary file beside path (mode 0600), fsync, rename, fsync the directory. Raises OSError."""
    folder = os.path.dirname(path)
    with tempfile.NamedTemporaryFile(prefix=".tmp-", dir=folder, delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.replace(f.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(f.name)
            raise
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_state(path, warn):
    """The JSON object in path, or {} if there is none. A torn or foreign file is set aside and reported. Raises OSError if it cannot be read."""
    try:
        with open(path, "rb") as f:
            got = json.loads(f.read())
        require(isinstance(got, dict), "not an object")
        return got
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as e:
        aside = f"{path}.bad-{int(time.time())}"
        with contextlib.suppress(OSError):
            os.replace(path, aside)
        warn(f"{os.path.basename(path)} could not be read ({type(e).__name__}) and was set aside as {os.path.basename(aside)}")
        return {}


def restore(cls, got, **makers):
    """A dataclass as JSON kept it; makers build a field from its JSON. Raises ValueError, TypeError or AttributeError for another shape."""
    values = {}
    for f in dataclasses.fields(cls):
        value = got.get(f.name, f.default)
        value = makers[f.name](value) if value and f.name in makers else tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, f.type) or isinstance(value, int) and isinstance(0.5, f.type)
        require(fits and (not isinstance(value, float) or math.isfinite(value)), f"{f.name} is of another type")
        values[f.name] = value
    return cls(**values)


def log(message):
    """To standard error, where systemd and a terminal look for it. Never raises: a full disk there must not stop a swap."""
    first, *more = message.splitlines()[:80] or [""]
    with contextlib.suppress(OSError, ValueError):
        print("\n".join((f"{utc()} {printable(first)}", *("    " + printable(line, 400) for line in more))), file=sys.stderr, flush=True)


def write_state(path, doc, code=None):
    """Write a JSON state file. If that fails: raises Refused 503 with that code, or without one only logs it."""
    try:
        write_atomic(path, to_json(doc))
    except OSError as e:
        log(f"{path} cannot be written: {e.strerror}; a restart now would lose what happened since")
        if code:
            raise Refused(503, code, f"{path} cannot be written: {e.strerror}; mend that and ask again") from None


def forever(name, closing, step):
    """A thread, not yet started, that calls step() until closing is set, or it answers "over". No thread dies silently."""
    def run():
        while not closing.is_set():
            try:
                if step() == "over":
                    return
            except Exception as e:
                log(f"{name}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
                closing.wait(1)
    return threading.Thread(target=run, name=name, daemon=True)


class Hub:
    """The version that long-polls wait on; anything that changes what /api/state shows calls bump()."""

    def __init__(self):
        self.boot = secrets.token_hex(4)        # so that a version never repeats across restarts
        self.closing = threading.Event()        # set when sparkctl ends: who looks or waits stops
        self.changed = threading.Condition()
        self._count = 0                         # guarded by changed

    def bump(self):
        with self.changed:
            self._count += 1
            self.changed.notify_all()

    def version(self):
        with self.changed:
            return f"{self.boot}.{self._count}"

    def wait_for(self, predicate, timeout_s):
        """Block until predicate() is true or timeout_s is over; tells which. predicate is asked while no lock is held."""
        deadline = time.monotonic() + timeout_s
        while True:
            with self.changed:
                seen = self._count
            if predicate():
                return True
            with self.changed:
                if self._count == seen and not self.changed.wait(max(0, deadline - time.monotonic())):
                    break
        return predicate()


# === 3 hosts ==================================================================
# spawn() is the only place that starts a process, ssh or sh and nothing else. Remote text travels as one argument:
# sh -c SCRIPT, so the login shell of the Spark does not matter. Every call has a time limit. Calls share one
# connection per Spark (ControlMaster), whose socket lies in a private 0700 directory.


@dataclasses.dataclass(frozen=True)
class Spark:
    """One DGX Spark as configured."""
    name: str                   # spark1, spark2, …
    host: str                   # what ssh is given, or `local`
    user: str = ""

    @property
    def local(self):
        return self.host == "local"


class Result(NamedTuple):
    """How a remote command ended. kind: ok, failed (it ran, exit code in code), or why it did not get there."""
    kind: str
    code: int
    out: str
    err: str

    @property
    def reached(self):
        return self.kind in ("ok", "failed")


SSH_FAILURES = (    # (pattern in ssh's own words, kind, what an operator does)
    (r"Host key verification failed|REMOTE HOST IDENTIFICATION HAS CHANGED", "unknown_host_key",
     "run `ssh {target}` once by hand and accept the key, or mend known_hosts"),
    (r"Permission denied \(|Too many authentication failures|No more authentication methods", "refused_login",
     "copy your public key to the Spark: ssh-copy-id {target}"),
    (r"Could not resolve hostname", "unreachable", "check the spelling of the host or its entry in ~/.ssh/config"),
    (r"timed out|Timeout, server", "time_out", "is the Spark on, and on this network?"),
    (r"", "unreachable", "is the Spark on, on this network, and running sshd?"),
)


def classify_ssh_failure(stderr):
    """ssh's stderr after exit 255 -> (kind, its last telling line, remedy)."""
    lines = [l.strip() for l in stderr.splitlines() if l.strip() and not l.startswith(("Warning:", "mux_client", "ControlSocket"))]
    lines = lines or ["ssh ended without a word"]       # which the last pattern matches, as it does any line
    return next((kind, hit[-1], remedy) for pattern, kind, remedy in SSH_FAILURES if (hit := [l for l in lines if re.search(pattern, l)]))


def ssh_argv(spark, control_dir, *extra):
    """The argv of one ssh call, up to the remote command. Hosts are charset-checked and follow `--` all the same."""
    login = ("-l", spark.user) if spark.user else ()
    return ["ssh", "-T", "-x", "-a", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
            "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2", "-o", "ControlMaster=auto",
            "-o", f"ControlPath={control_dir}/%C", "-o", "ControlPersist=60", *login, *extra, "--", spark.host]


def spawn(argv, **streams):
    """Start a process in a session of its own, so that a Ctrl-C in our terminal does not reach it."""
    env = {k: v for k, v in os.environ.items() if k not in SECRETS}
    return subprocess.Popen(argv, start_new_session=True, env={**env, "LC_ALL": "C"}, **streams)


def kill_group(process):
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end_process(process):
    kill_group(process)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for stream in filter(None, (process.stdin, process.stdout, process.stderr)):
        stream.close()


OUTPUT_MAX = 16 << 20           # bytes that one remote command may say
CHILDREN = set()                # processes of run_process; each is added and taken out by the thread that runs it


def end_children():
    """Kill what still runs when we end: an ssh that hangs would outlive us. What it began on the Spark is left alone."""
    for process in CHILDREN.copy():
        kill_group(process)


class Cancelled(Exception):
    """The running swap was told to stop."""


def run_process(argv, timeout_s, cancel=None, send=None):
    """Run a program to its end -> Result: ok, failed or time_out. Raises OSError if it cannot start, Cancelled once cancel is set.

    send(pipe, line) is given what it says on out and err as it comes; what it does not take of err is in the Result.
    """
    deadline, read, rests = time.monotonic() + timeout_s, {"out": bytearray(), "err": bytearray()}, {"out": b"", "err": b""}
    process = spawn(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    CHILDREN.add(process)
    try:
        with selectors.DefaultSelector() as ready:
            ready.register(process.stdout, selectors.EVENT_READ, "out")
            ready.register(process.stderr, selectors.EVENT_READ, "err")
            while ready.get_map():
                for key, _ in ready.select(min(0.1, max(0.0, deadline - time.monotonic()))):
                    pipe, chunk = key.data, os.read(key.fd, 65536)
                    *lines, rest = (rests[pipe] + (chunk or b"\n" * bool(rests[pipe]))).split(b"\n") if send else (b"",)
                    rests[pipe] = rest if len(rest) <= 1 << 20 else b""
                    for line in lines:
                        if not send(pipe, line.decode("utf-8", "replace")) and pipe == "err":
                            read["err"] += line + b"\n"
                    read[pipe] += b"" if send else chunk
                    if not chunk:
                        ready.unregister(key.fileobj)
                if cancel and cancel.is_set():
                    raise Cancelled("cut off")
                if deadline <= time.monotonic():
                    raise subprocess.TimeoutExpired(argv, timeout_s)
                if len(read["out"]) + len(read["err"]) > OUTPUT_MAX:
                    return Result("failed", -1, "", f"more than {OUTPUT_MAX >> 20} MiB of output")
        code = process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return Result("time_out", -1, read["out"].decode("utf-8", "replace"), f"no end within {timeout_s:.3g} s")
    finally:
        end_process(process)
        CHILDREN.discard(process)
    return Result("failed" if code else "ok", code, read["out"].decode("utf-8", "replace"), read["err"][-65536:].decode("utf-8", "replace"))


class Hosts:
    """Runs scripts on Sparks. Safe to call from any thread."""

    def __init__(self, sparks):
        self.sparks = {s.name: s for s in sparks}                   # fixed
        self.control_dir = self._private_dir()                      # fixed
        self._lock = threading.Lock()
        self._addresses = {}                                        # guarded by _lock

    @staticmethod
    def _private_dir():
        """A new 0700 directory with a short name (a socket path has 108 bytes); those of dead predecessors go."""
        for name in os.listdir(tempfile.gettempdir()):
            if m := re.fullmatch(r"sparkctl-(\d+)-\w+", name):
                path = os.path.join(tempfile.gettempdir(), name)
                with contextlib.suppress(OSError):
                    if os.lstat(path).st_uid == os.getuid() and not os.path.exists(f"/proc/{m[1]}") and os.path.exists("/proc/1"):
                        shutil.rmtree(path)
        return tempfile.mkdtemp(prefix=f"sparkctl-{os.getpid()}-")

    def argv(self, spark, script):
        return ["sh", "-c", script] if spark.local else [*ssh_argv(spark, self.control_dir), "sh -c " + quote_arg(script)]

    def run(self, name, script, timeout_s, cancel=None, send=None):
        """Run script on that Spark, or the one of that name, for timeout_s at most, twice if the shared connection was bad -> Result. Raises Cancelled once cancel is set."""
        spark = name if isinstance(name, Spark) else self.sparks[name]
        result = self.run_once(spark, script, timeout_s, cancel, send)
        # A shared connection that is stale or frozen is torn down. A socket whose master died is replaced by ssh itself;
        # a master that answers oddly, or a session that ended without a word because the master was told to exit
        # meanwhile, deserves one more try: every script of ours may be run twice without harm.
        stale = result.kind == "unreachable" and re.search(r"mux_client_\w{1,40}: |without a word", result.err)
        frozen = result.kind == "time_out" and not spark.local and self.run_once(spark, "true", 5, cancel, None).kind != "ok"
        if frozen or stale and "mux" in result.err:
            self.reset(spark)
        return self.run_once(spark, script, timeout_s, cancel, send) if stale else result

    def run_once(self, spark, script, timeout_s, cancel, send):
        """Like run(), which see, and not a second time whatever happens."""
        try:
            got = run_process(self.argv(spark, script), timeout_s, cancel, send)
        except OSError as e:
            return Result("unreachable", -1, "", f"{e.filename}: {e.strerror}; install openssh-client")
        if got.code == 255 and not spark.local:
            kind, line, _ = classify_ssh_failure(got.err)
            return got._replace(kind=kind, err=got.err if "mux_client" in got.err else line)
        return got

    def reset(self, spark):
        """Drop the shared connection: ask its master to exit, and unlink the socket if it does not."""
        with contextlib.suppress(OSError):
            run_process(ssh_argv(spark, self.control_dir, "-O", "exit"), 2)
            os.unlink(self._resolve(spark).get("controlpath", ""))

    def _resolve(self, spark):
        """What `ssh -G` makes of the configuration: lower-case option -> value. Raises OSError."""
        out = run_process(ssh_argv(spark, self.control_dir, "-G"), 5).out
        return dict(line.split(" ", 1) for line in out.splitlines() if " " in line)

    def address(self, name, again=False):
        """The host for HTTP: what ssh resolves the alias to; 127.0.0.1 for `local`. Cached; a failure too, until asked again."""
        spark = self.sparks[name]
        if spark.local:
            return "127.0.0.1"
        with self._lock:
            found = self._addresses.get(name)
        if found is None or again and not found:
            found = ""
            with contextlib.suppress(OSError, KeyError):    # ssh could not start, or did not end in time
                found = self._resolve(spark)["hostname"]
            with self._lock:
                self._addresses[name] = found
        return found or spark.host

    def each(self, hosts, job):
        """job(name) for several Sparks at once -> {name: what it returned}; an exception is raised to the caller."""
        with ThreadPoolExecutor(max(1, len(hosts))) as pool:
            return dict(zip(hosts, pool.map(job, hosts)))

    def close(self):
        """End the shared connections and remove their directory. Engines are left alone."""
        for spark in self.sparks.values():
            if not spark.local and os.listdir(self.control_dir):
                self.reset(spark)
        shutil.rmtree(self.control_dir, ignore_errors=True)


def remedy_for(result, spark):
    """What to do about a Result that did not reach its Spark."""
    target = f"{spark.user}@{spark.host}" if spark.user else spark.host
    return next((remedy.format(target=target) for _, kind, remedy in SSH_FAILURES if kind == result.kind), "")


# === 4 catalog ================================================================
# Two YAML files become frozen records. One bad entry is reported and skipped; the others still load.

SECRETISH = re.compile(r"(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD)$", re.I)     # of a knob or an environment: values not shown
KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
KNOB = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,127}")
OURS = frozenset(("port", "served-model-name", "model", "nnodes", "node-rank", "master-addr", "master-port", "headless"))


def hide(said, hidden):
    """A text without the secrets in hidden, however sh, bash's printf %q or JSON spell them."""
    for value in sorted(hidden, key=len, reverse=True):
        for form in {value, value.replace("'", "'\"'\"'"), re.sub(r"([^\w@%+=:,./-])", r"\\\1", value), json.dumps(value, ensure_ascii=False)[1:-1]}:
            said = said.replace(form, "***")
    return said


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """One model that may be served. Exactly one of repo and local_path is set."""
    key: str
    name: str
    repo: str = ""
    local_path: str = ""
    mode: str = "solo"          # solo | cluster: sharded over every Spark of the slot
    aliases: tuple = ()
    knobs: tuple = ()           # ((flag, value), …) with values as JSON can hold them
    args: tuple = ()            # verbatim vLLM arguments that knobs cannot say
    env: tuple = ()             # ((NAME, value), …) for the engine
    image: str = ""             # container image for launch-cluster.sh -t; blank = its default
    size_gb: float = 0          # GiB of weights, for checks before they are on disk; 0 = unknown
    description: str = ""
    added: bool = False         # from the overrides file
    hidden: bool = False        # by the overrides file: kept, but not served
    overridden: tuple = ()      # knobs that the overrides file changes
    served_names: tuple = ()    # key first; what the engine answers to, unique over the catalog

    @property
    def source(self):
        """What `vllm serve` is given."""
        return self.local_path or self.repo

    def secrets(self):
        """Values of what is named like a secret in its environment, knobs and args: no log, reply or event may hold them."""
        def flat(value):
            parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else None
            return [str(value)] if parts is None else [text_ for part in parts for text_ in flat(part)]
        named, flag_ = [*self.env, *self.knobs], ""
        for arg in self.args:
            name, _, value = arg.partition("=")
            flag_, value = (name, value) if arg.startswith("--") else (flag_, arg)
            named.append((flag_, value))
        return {value for name, given in named if SECRETISH.search(name) for value in flat(given) if len(value) >= 3 and value not in ("True", "False", "None")}

    def public(self):
        knobs, env = ({k: "***" if SECRETISH.search(k) else v for k, v in pairs} for pairs in (self.knobs, self.env))
        got = {**vars(self), "knobs": knobs, "args": [hide(arg, self.secrets()) for arg in self.args], "env": env, "image": self.image or None, "size_gb": self.size_gb or None}
        del got["repo" if self.local_path else "local_path"]
        return got


def validate_repo(value):
    """A Hugging Face `org/name`, by the hub's own rules (huggingface_hub utils/_validators.py). Raises ValueError."""
    require(re.fullmatch(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", value, re.ASCII) and len(value) <= 96
            and not re.search(r"--|\.\.|\./|-/|(\.git|-|\.)$", value), "must be a Hugging Face repo `org/name`")
    return value


def validate_local_path(value, roots):
    """A directory that may be mounted into a container, as text (nothing is looked up). Raises ValueError."""
    # colons and commas would change what docker's -v and --mount mean; `..` and other spellings could leave the roots
    require(value.startswith("/"), "must be an absolute path")
    require(not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069:,]", value),
            "must not contain control characters, colons or commas")
    require(len(value) <= 1024 and not value.startswith("//") and os.path.normpath(value) == value,
            "must be normalised: no `..`, no double or trailing slash, at most 1024 characters")
    require(any(value.startswith(root.rstrip("/") + "/") for root in roots), f"must be below one of {', '.join(roots)} (LOCAL_MODEL_ROOTS)")
    return value


def expect(kind, value):
    """value if it is of the kind, else ValueError that names the kind."""
    wanted = {"text": str, "bool": bool, "number": (int, float), "whole number": int, "list": list, "mapping": dict}[kind]
    require(isinstance(value, wanted) and (kind == "bool" or not isinstance(value, bool)), f"must be a {kind}")
    require(kind != "number" or math.isfinite(value), "must be a number")
    return re.sub("[\ud800-\udfff]", "\ufffd", value) if kind == "text" else value     # text that UTF-8 can hold


def plain(value):
    """YAML scalars that JSON and a command line can hold; dates and NaN are refused. Raises ValueError."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    require(value is None or isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value),
            f"{value!r} is neither text, number, true, false, list nor mapping: quote it")
    require(not isinstance(value, int) or abs(value) < 1 << 63, "is too large a number")
    if isinstance(value, str):
        quote_arg(value)                        # no NUL, valid Unicode
    return value


def parse_knobs(value):
    for k in expect("mapping", value):
        require(KNOB.fullmatch(str(k)), f"{str(k)[:80]!r} is not a flag name (write it without leading dashes)")
        require(str(k).replace("_", "-") not in OURS, f"{k} is set by sparkctl or the launcher")
    return tuple((str(k), plain(v)) for k, v in value.items())


def parse_env(value):
    for k, v in expect("mapping", value).items():
        require(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", str(k)) and not isinstance(v, (dict, list, type(None))),
                f"{k} must be an environment name with a text or a number")
    return tuple((str(k), "1" if v is True else "0" if v is False else str(plain(v))) for k, v in value.items())


def parse_names(value):
    for alias in expect("list", value):
        require(isinstance(alias, str) and re.fullmatch(r"[A-Za-z0-9][\w./:-]{0,127}", alias, re.ASCII),
                f"{alias!r} is not a model name (letters, digits, . _ / : -)")
    return tuple(dict.fromkeys(value))


MODEL_FIELDS = {
    "name": lambda v: printable(expect("text", v), 200), "repo": lambda v: validate_repo(expect("text", v)),
    "mode": matching("solo|cluster", "must be one of solo, cluster"), "aliases": parse_names, "knobs": parse_knobs, "env": parse_env,
    "args": lambda v: tuple(str(plain(a)) for a in expect("list", v)),
    "image": matching(r"[A-Za-z0-9][\w./:@-]{0,254}", "must be a container image"),
    "description": lambda v: expect("text", v)[:2000], "size_gb": lambda v: float(amount(0, 100_000, "a number of GiB")(v)),
}


def parse_model(key, entry, roots, **more):
    """One catalog entry -> (ModelDef or None, [(field, message)])."""
    if not isinstance(key, str) or not KEY.fullmatch(key):
        return None, [("", f"the key {key!r} must match {KEY.pattern}")]
    if not isinstance(entry, dict):
        return None, [("", "must be a mapping")]
    fields, wrong = {}, []
    parsers = {**MODEL_FIELDS, "local_path": lambda v: validate_local_path(expect("text", v), roots)}
    for name, value in entry.items():
        if name not in parsers:
            hint = nearest(name, parsers)
            wrong.append((str(name), "is not a field of a model" + (f"; did you mean {hint}?" if hint else "")))
        elif value is not None:
            try:
                fields[name] = parsers[name](value)
            except (ValueError, TypeError, OverflowError) as e:
                wrong.append((name, str(e)))
    if not wrong and bool(fields.get("repo")) == bool(fields.get("local_path")):
        wrong.append(("", "needs exactly one of repo and local_path"))
    return (None if wrong else ModelDef(key, fields.pop("name", key), **fields, **more)), wrong


def claim_names(models, file):
    """Give each model the names its engine will answer to -> (models, problems)."""
    # a name that two models claim would make requests go to either, so neither gets it; a key always stays its own
    wanted = {m.key: list(dict.fromkeys(filter(None, (m.key, m.repo, *m.aliases)))) for m in models.values()}
    claims = collections.Counter(name for wishes in wanted.values() for name in wishes)
    out, problems = {}, []
    for m in models.values():
        for name in (n for n in wanted[m.key] if claims[n] > 1):
            others = ", ".join(k for k in wanted if k != m.key and name in wanted[k])
            problems.append(Problem(file, m.key, "served_names", f"the name {name} is claimed by {others} too"))
        out[m.key] = dataclasses.replace(m, served_names=tuple(n for n in wanted[m.key] if n == m.key or claims[n] == 1))
    return out, problems


class LoudLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which YAML would let the last one win in silence."""

    def loud_mapping(self, node):
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != "tag:yaml.org,2002:merge":
                key = self.construct_object(key_node)
                if key in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
                seen.add(key)
        return self.construct_mapping(node, deep=True)


LoudLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, LoudLoader.loud_mapping)


def parse_yaml(data, loader=LoudLoader):
    """The mapping in YAML's bytes; {} where there is nothing. Raises ValueError with line and reason."""
    try:
        got = yaml.load(data.decode("utf-8"), loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}{getattr(e, 'problem', None) or 'not YAML'}") from None
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as e:      # `!!int ''`, say
        raise ValueError(f"not readable as UTF-8 YAML ({type(e).__name__})") from None
    require(got is None or isinstance(got, dict), "must be a mapping at the top")
    return got or {}


def read_yaml(path, must_exist=False):
    """The mapping in a YAML file; {} where it is empty, or absent and need not exist. Raises OSError, ValueError with line and reason."""
    try:
        with open(path, "rb") as f:
            return parse_yaml(f.read())
    except FileNotFoundError:
        if must_exist:
            raise
        return {}


def to_yaml(doc):
    return yaml.safe_dump(doc, sort_keys=False, allow_unicode=True, default_flow_style=False, width=120)


def read_sections(file, doc, known, problems):
    """The sections of a YAML file: for each known name what stands under it, or its empty value. Adds what is wrong to problems."""
    for name in set(map(str, doc)) - set(known):
        problems.append(Problem(file, name, "", f"is not known here (known: {', '.join(sorted(known))})"))
    for name, empty in known.items():
        fits = isinstance(doc.get(name) or empty, type(empty))
        if not fits:
            problems.append(Problem(file, name, "", f"must be a {'mapping' if empty == {} else 'list'}"))
        yield doc.get(name) or empty if fits else empty


def respelled(change, known):
    """Knobs with each name as known spells it: with _ or - it is the same flag."""
    spelled = {name.replace("_", "-"): name for name in known}
    return {spelled.get(name.replace("_", "-"), name): value for name, value in change.items()}


OVERRIDES = {"models": {}, "knobs": {}, "hidden": []}       # sections of the overrides file, and what an absent one counts as


def parse_catalog(base, overrides, roots, base_file="models.yaml", overrides_file="models-overrides.yaml"):
    """Two parsed YAML files -> ({key: ModelDef}, the hidden ones too, [Problem]). Pure; never raises for what stands in them."""
    problems, models = [], {}
    shipped, = read_sections(base_file, base, {"models": {}}, problems)
    own, knobs, hidden = read_sections(overrides_file, overrides, OVERRIDES, problems)
    for file, entries, added in ((base_file, shipped, False), (overrides_file, own, True)):
        for key, entry in entries.items():
            model, wrong = parse_model(key, entry, roots, added=added)
            problems += [Problem(file, str(key), field, message) for field, message in wrong]
            if model:
                models[key] = model
    for key, change in knobs.items():
        try:
            require(key in models, "is not a model of the catalog")
            base = dict(models[key].knobs)
            change = respelled(dict(parse_knobs(change)), base)
            merged = tuple((k, v) for k, v in {**base, **change}.items() if v is not None)
            models[key] = dataclasses.replace(models[key], knobs=merged, overridden=tuple(change))
        except ValueError as e:
            problems.append(Problem(overrides_file, f"knobs.{key}", "", str(e)))
    named, clashes = claim_names({k: m for k, m in models.items() if k not in hidden}, base_file)
    return {k: named.get(k) or dataclasses.replace(m, hidden=True) for k, m in models.items()}, problems + clashes


# --- recipes of spark-vllm-docker; what they may hold: its run-recipe.py (load_recipe, generate_launch_script) and recipes/

RECIPE = {"command": "", "defaults": {}, "env": {}, "mods": [], "build_args": []}
SHARDS_OVER = {"tensor-parallel-size": "-tp", "pipeline-parallel-size": "-pp", "data-parallel-size": "-dp"}
SHORT_FLAGS = {**{short: name for name, short in SHARDS_OVER.items()}, "-q": "quantization"}


def fill_recipe(command, values):
    """What str.format(**values) makes of plain {names}; nothing else in an untrusted file is evaluated. Raises ValueError."""
    require(len(command) <= 1 << 14, "the command is longer than 16 KiB")
    def part(m):
        known = isinstance(values.get(m[1]), (str, int, float)) and len(str(values[m[1]])) <= 1000
        require(m[0] in ("{{", "}}") or known, f"the command's {m.string[m.start():m.start() + 40].splitlines()[0]!r} "
                "is not the name of a default; a brace that is meant as one is written twice: {{ }}")
        return str(values[m[1]]) if known else m[0][0]
    return re.sub(r"\{\{|\}\}|\{(\w+)\}|[{}]", part, command)


def shell_words(script):
    """The words of a shell script that is one simple command. Raises ValueError for any other."""
    # quoted text stays; a continued line goes on, even if blanks stand behind its backslash; comments go
    script = re.sub(r"""('[^']*'|"(?:\\.|[^"\\])*")|\\[ \t]*(?:\n|$)|(?<!\S)#.*""", lambda m: m[1] or " ", script).strip()
    lexer = shlex.shlex(script, posix=True, punctuation_chars=";&|<>()\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    for word in (words := list(lexer)):
        require(not word or word.strip(";&|<>()\n"), f"the command is not simple: {'a new line' if word.isspace() else word} in it")
    return words


def recipe_value(word):
    """A flag's value as YAML would rather have it, if that becomes the same flag again."""
    with contextlib.suppress(ValueError, RecursionError):
        got = json.loads(word)
        return plain(got) if isinstance(got, dict) or type(got) in (int, float) and str(got) == word else word
    return word


def import_recipe(recipe, sparks):
    """A recipe, and how many Sparks a cluster has -> (entry of models.yaml, [what it cannot say]). Raises ValueError."""
    given = [empty if recipe.get(name) is None else recipe[name] for name, empty in RECIPE.items()]
    for name, value in zip(RECIPE, given):
        require(isinstance(value, type(RECIPE[name])), f"{name} cannot be a {type(value).__name__}")
    command, defaults, env, mods, builds = given
    for value in (*env.values(), *mods, *builds, recipe.get("recipe_version"), recipe.get("runtime")):
        require(not isinstance(value, (dict, list)), "env, mods, build_args, recipe_version and runtime hold texts and numbers only")
    version, runtime, dynamic = str(recipe.get("recipe_version", "missing")), str(recipe.get("runtime") or "vllm"), re.compile(r"[$`\0]")
    require(runtime.startswith("vllm"), f"its runtime, {runtime}, is not vLLM")
    notes = [f"recipe_version is {version}; read as 1"] if version != "1" else []
    notes += [f"the image must be made with {what}: {' '.join(map(str, wanted))}"
              for what, wanted in (("mods", mods), ("build_args", builds)) if wanted]
    unsaid = {k for k, v in env.items() if v is None or dynamic.search(str(v))}
    notes += [f"env {k} is left out: only a shell knows its value" for k in env if k in unsaid]
    words = shell_words(fill_recipe(command.strip(), {"model": recipe.get("model"), **defaults}))
    require(words[:2] == ["vllm", "serve"] and len(words) > 2 and words[2][:1] != "-", "the command does not begin with `vllm serve MODEL`")
    model, flags, args, knobs, aliases, shards = words[2], [], [], {}, [], {}
    for word in words[3:]:
        flag, equals, value = word.partition("=")
        if re.match(r"--?[A-Za-z]", word):      # (name or "", values, as it is written)
            flags.append((SHORT_FLAGS.get(flag, flag[2:].replace("_", "-") if flag[1] == "-" else ""), [value] if equals else [], [word]))
        else:
            for place in flags[-1][1:] if flags else [args]:
                place.append(word)
    often = collections.Counter(name for name, _, _ in flags)
    for name, values, written in flags:
        why = "a shell would change it" if dynamic.search(" ".join(values)) else \
            "sparkctl or the launcher sets it" if name in OURS - {"port", "served-model-name"} else \
            "it needs the mod gpu-mem-util-gb" if name == "gpu-memory-utilization-gb" and "gpu-mem-util-gb" not in str(mods) else ""
        if why:
            notes.append(f"left out, since {why}: {' '.join(written)}")
        elif name == "served-model-name":
            aliases += [alias for alias in values if alias not in (model, *aliases)]
        elif name in SHARDS_OVER:
            shards[name] = number(1, 64, int)(" ".join(values))
        elif name in ("port", "host", "distributed-executor-backend"):
            continue
        elif often[name] > 1 or not KNOB.fullmatch(name):
            args += written
        else:
            knobs[name] = [recipe_value(value) for value in values] if len(values) > 1 else recipe_value(values[0]) if values else True
    wide = math.prod(shards.values())
    cluster = not recipe.get("solo_only") and bool(recipe.get("cluster_only") or wide > 1)
    if cluster and shards and {k: n for k, n in shards.items() if n > 1} != {"tensor-parallel-size": sparks}:
        knobs |= {"tensor-parallel-size": 1} | shards
        notes += [f"it is for {wide} Sparks, and a cluster has {sparks} here"] if wide != sparks else []
    elif wide > 1 and not cluster:
        notes.append(f"it is for one Spark, so what would spread it over {wide} is left out")
    said = {k: printable(" ".join(v.split()), 1000) if isinstance(v := recipe.get(k), str) else "" for k in ("name", "container", "description")}
    entry = {"name": said["name"], "local_path" if model.startswith("/") else "repo": model, "mode": "cluster" if cluster else "solo",
             "aliases": aliases, "image": "" if said["container"] == "vllm-node" else said["container"], "knobs": knobs, "args": args,
             "env": {str(k): str(v) for k, v in env.items() if k not in unsaid}, "description": said["description"]}
    return {k: v for k, v in entry.items() if v}, [printable(note, 1000) for note in notes]


# === 5 services ===============================================================
# Slots (where one model is served), backends (command templates) and services (everything else with a tile).

WORDS = ("model", "served_names", "container", "port", "extra_args", "env", "mounts", "since")
WORD = re.compile(r"\{(%s)\}" % "|".join(WORDS))
WORDS_OF = {"stop": ("container", "port"), "alive": ("container", "port"), "logs": ("container", "port", "since"),
            "launch": tuple(w for w in WORDS if w != "since")}     # what is known when the command runs


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place where one model is served."""
    name: str
    hosts: tuple                # names of Sparks, head first
    port: int
    container: str
    backend: str                # launch-cluster, or the name of a command template


class Template(NamedTuple):
    """How a slot's engine is stopped, launched and watched: shell text with {words}."""
    stop: str
    launch: str
    logs: str = ""
    alive: str = ""


@dataclasses.dataclass(frozen=True)
class Service:
    """Something on a Spark that has a tile."""
    name: str
    kind: str
    host: str = ""
    port: int = 0
    label: str = ""
    container: str = ""
    health: str = ""
    url: str = ""
    user: str = ""
    configured: bool = False    # by the services file, not only built in


Layout = collections.namedtuple("Layout", "slots backends services")        # of dicts by name


class Kind(NamedTuple):
    """What is known of a kind of service."""
    health: str                             # path of its health check
    ask: tuple = ()                         # paths that tell what it has; the first that answers 200 counts
    tell: Callable = lambda doc: {}         # that answer's JSON -> facts for the tile
    real: Callable = lambda facts: ()       # real requests: (path, body, None = GET, whether an answer shows work); one that is known there
    key: str = ""                           # the setting with its key
    base: str = ""                          # where its OpenAI API begins
    busy: str = "unknown"                   # what a 503 to its health check means


def silent_second(facts):
    """A form with one second of silence to transcribe: WAV, 16 kHz, 16 bit, mono."""
    wav = struct.pack("<4sI8sIHHIIHH4sI", b"RIFF", 32036, b"WAVEfmt ", 16, 1, 1, 16000, 32000, 2, 16, b"data", 32000) + bytes(32000)
    part = '--sparkctl\r\nContent-Disposition: form-data; name="{}"\r\n\r\n'
    head = part.format("model") + str(facts.get("model") or "whisper-1") + "\r\n" + part.format('file"; filename="silence.wav')
    return "/v1/audio/transcriptions", head.encode() + wav + b"\r\n--sparkctl--\r\n", lambda said: isinstance(json.loads(said)["text"], str)


MODEL = lambda doc: {"model": doc["data"][0]["id"] if "data" in doc else doc["model_id"]}
HELLO = [{"role": "user", "content": "Hello"}]
CHAT = lambda facts: ("/v1/chat/completions", {"model": facts.get("model"), "messages": HELLO, "max_tokens": 1},
                      lambda said: isinstance(json.loads(said)["choices"][0]["message"], dict))
WRITE = lambda facts: ("/v1/completions", {"model": facts.get("model"), "prompt": "Hello", "max_tokens": 1},
                       lambda said: isinstance(json.loads(said)["choices"][0]["text"], str))
EMBED = lambda facts: ("/v1/embeddings", {"model": facts.get("model"), "input": "Hello"},
                       lambda said: (vector := json.loads(said)["data"][0]["embedding"]) and all(map(math.isfinite, vector)))
POOL = lambda facts: ("/pooling", {"model": facts.get("model"), "input": "Hello"}, lambda said: expect("list", json.loads(said)["data"]))
ENGINE_WORK = lambda facts: (WRITE(facts), EMBED(facts), POOL(facts), silent_second(facts))     # of a vLLM, whatever its model does
VOICES = lambda doc: {"voices": [v["id"] if isinstance(v, dict) else v for v in expect("list", doc["voices"])]}
SPEAK = lambda facts: ("/v1/audio/speech", {"model": "kokoro", "input": "Hello", "voice": (facts.get("voices") or ["af_heart"])[0],
                                            "response_format": "wav"}, lambda said: said.startswith((b"RIFF", b"ID3", b"OggS", b"fLaC", b"\xff")))
# Sources: vLLM's own routes; docs.nvidia.com/nim; text-embeddings-inference (/info); Qdrant's openapi.json; Kokoro-FastAPI's
# routers, where voices are names in older versions and {id, name} in newer ones.
KINDS = {
    "vllm": Kind("/health", real=lambda facts: (CHAT(facts), *ENGINE_WORK(facts)), key="VLLM_API_KEY", base="/v1"),
    "asr": Kind("/health", ("/v1/models",), MODEL, lambda facts: (silent_second(facts),), base="/v1"),
    "tts": Kind("/health", ("/v1/audio/voices",), VOICES, lambda facts: (SPEAK(facts),), base="/v1"),
    "embeddings": Kind("/health", ("/info", "/v1/models"), MODEL, lambda facts: (EMBED(facts),), base="/v1"),
    "qdrant": Kind("/readyz", ("/collections",), lambda doc: {"collections": [c["name"] for c in doc["result"]["collections"]]},
                   lambda facts: (("/collections", None, lambda said: isinstance(json.loads(said)["result"]["collections"], list)),), "QDRANT_API_KEY", busy="loading"),
    "nim": Kind("/v1/health/ready", ("/v1/models",), MODEL, lambda facts: (CHAT(facts),), base="/v1", busy="loading"),
    "open-webui": Kind("/health", ("/api/version",), lambda doc: {"version": doc["version"]}), "http": Kind("/")}
BUILTINS = (("parakeet", "asr", 8001), ("kokoro", "tts", 8880), ("embeddings", "embeddings", 8010),
            ("qdrant", "qdrant", 6333), ("nim", "nim", 9000), ("open-webui", "open-webui", 3000))


def quoted_words(template):
    """The {words} that stand inside quotes of a shell template, or after a backslash, where their own quoting would be undone."""
    quoted = re.finditer(r"""\\(\{\w+\}|.)|'[^']*'?|"(\\.|[^"\\])*"?|`(\\.|[^`\\])*`?""", template, re.S)
    return [word for part in quoted for word in WORD.findall(part[0])]


def fields_of(entry, **defaults):
    """The values of a mapping's fields, in the order of defaults; null counts as not given. Raises ValueError for any other field."""
    for name in sorted(str(name) for name in expect("mapping", entry) if name not in defaults):
        raise ValueError(f"{name}: is not one of {', '.join(defaults)}")
    return {**defaults, **{name: value for name, value in entry.items() if value is not None}}.values()


def parse_template(entry):
    """A backend entry -> Template. Raises ValueError."""
    got = Template(*(expect("text", value).strip() for value in fields_of(entry, stop="", launch="", logs="", alive="")))
    for name, value in got._asdict().items():
        require("\0" not in value and (value or name not in entry), f"{name}: must be a command")
        if bad := quoted_words(value):
            raise ValueError(f"{name}: {{{bad[0]}}} stands inside quotes, which would undo its quoting; take the quotes away")
        for word in WORD.findall(value):
            require(word in WORDS_OF[name], f"{name}: {{{word}}} is not known to this command (known: {', '.join(WORDS_OF[name])})")
    require(got.stop and got.launch, "needs both stop and launch")
    return got


def parse_slot(name, entry, sparks, backends, others):
    """A slot that shares neither container nor port with the others: a swap of one would stop the other. Raises ValueError."""
    hosts, port, container, backend = fields_of(entry, hosts=list(sparks), port=8888, container="vllm_node", backend="launch-cluster")
    require(isinstance(hosts, list) and hosts and len(set(map(str, hosts))) == len(hosts), "hosts: must be a list of different Sparks")
    for host in hosts:
        require(isinstance(host, str) and host in sparks, f"hosts: {host} is not configured (known: {', '.join(sparks) or 'none'})")
    require(1 <= expect("whole number", port) <= 65535, "port: must be from 1 to 65535")
    require(expect("text", backend) == "launch-cluster" or backend in backends, f"backend: {backend} is not defined")
    container = container_name(str(container))
    for other in others:
        theirs = f"is slot {other.name}'s already; this slot is left out"
        require(container != other.container or not set(hosts) & set(other.hosts), f"container: {container} {theirs}")
        require((port, hosts[0]) != (other.port, other.hosts[0]), f"port: {port} {theirs}")
    return Slot(name, tuple(hosts), port, container, backend)


def parse_service(name, entry, base, sparks):
    """A service; what its entry leaves out is as in base, the built-in one of that name, if there is one. Raises ValueError."""
    base = base or Service(name, "")
    kind, host, port, label, container, health, url, user = fields_of(
        entry or {}, kind=base.kind, host=base.host, port=base.port, name="", container=base.container, health="", url="", user="")
    require(isinstance(kind, str) and kind in KINDS, f"kind: must be one of {', '.join(KINDS)}")
    require(not expect("text", host) or host in sparks, f"host: {host} is not configured (known: {', '.join(sparks) or 'none'})")
    require(isinstance(port, int) and 0 <= port <= 65535, "port: must be a whole number up to 65535")
    health, url, container = (expect("text", v or "") for v in (health or base.health or KINDS[kind].health, url or base.url, container))
    require(health.startswith("/"), "health: must start with /")
    require(not url or re.match(r"https?://", url) and one_url(url), "url: must start with http:// or https://")
    require(url or host and port, "needs host and port, or url")
    return Service(name, kind, host, port, printable(str(label or base.label or name), 200), container and container_name(container),
                   health, url, user_name(str(user or "")), True)


def parse_layout(doc, sparks, settings, file="services-overrides.yaml"):
    """The parsed services file -> (Layout, [Problem]). Pure; a bad entry is reported and skipped."""
    problems, backends, slots, services = [], {}, {}, {}

    def read(section, entries, parse, into):
        for key, entry in entries.items():
            try:
                require(isinstance(key, str) and KEY.fullmatch(key), f"the name must match {KEY.pattern}")
                into[key] = parse(key, entry)
            except (ValueError, TypeError, AttributeError, OverflowError) as e:
                field, _, rest = str(e).partition(": ")
                told = (field, rest) if rest and " " not in field else ("", str(e))
                problems.append(Problem(file, f"{section}.{key}", *told))

    commands, places, others = read_sections(file, doc, {"backends": {}, "slots": {}, "services": {}}, problems)
    read("backends", commands, lambda key, entry: parse_template(entry), backends)
    read("slots", places, lambda key, entry: parse_slot(key, entry, sparks, backends, slots.values()), slots)
    if not doc.get("slots") and sparks:
        slots["main"] = Slot("main", tuple(sparks), settings["VLLM_PORT"], settings["VLLM_CONTAINER"], "launch-cluster")
    last = list(sparks)[-1] if sparks else ""
    builtin = {n: Service(n, kind, last, port, n.title(), health=KINDS[kind].health) for n, kind, port in BUILTINS}
    if url := settings["OPEN_WEBUI_URL"]:
        builtin["open-webui"] = dataclasses.replace(builtin["open-webui"], host="", port=0, url=url, configured=True)
    services.update(builtin)
    read("services", others, lambda key, entry: parse_service(key, entry, builtin.get(key), sparks), services)
    return Layout(slots, backends, services), problems


class Config(NamedTuple):
    """Everything read from files and the environment, as one immutable snapshot."""
    settings: Settings
    sparks: dict
    models: dict
    layout: Layout
    problems: tuple             # of Problem
    hidden: dict = {}           # models that the overrides file hides

    def find(self, name):
        """The ModelDef that answers to name (key, repo or alias), or None."""
        return self.models.get(name) or next((m for m in self.models.values() if name in m.served_names), None)


class ConfigStore:
    """Reads the YAML files, again when they change, and edits two of them; a broken one keeps what was last good, and is reported."""

    HEADER = ("# Edit this by hand as you like; it is read again when it changes. sparkctl edits it too (page, API, import-recipe):\n"
              "# comments are lost then, and the last file that had some is kept beside it as .bak. README.md says what may stand here.\n")

    def __init__(self, settings, paths, parse=None):
        self.started = settings                     # fixed: what was in force at the start, for what is read only then
        self.paths = paths                          # fixed: {"models", "overrides", "services"} -> path; with parse "settings" too
        self.sparks = {f"spark{n}": Spark(f"spark{n}", settings[f"SPARK{n}_HOST"], settings[f"SPARK{n}_USER"])
                       for n in range(1, 9) if settings[f"SPARK{n}_HOST"]}
        self._parse = parse or (lambda values: settings)            # fixed: what stands in settings.yaml -> Settings
        self._lock = threading.Lock()               # one reading or editing at a time
        self._seen = None                           # guarded by _lock
        self._good = dict.fromkeys(("settings", *paths), {})        # guarded by _lock
        self.current = None                         # replaced under _lock; read by any thread
        self.refresh()

    @property
    def settings(self):
        return self.current.settings

    def refresh(self):
        """Re-read if a file changed; tells whether a new snapshot was published."""
        with self._lock:
            return self._refresh_locked()

    def _refresh_locked(self):
        stamps = {}
        for name, path in self.paths.items():
            with contextlib.suppress(OSError):
                stat = os.stat(path)
                stamps[name] = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if stamps == self._seen:
            return False
        self._seen, broken = stamps, []
        for name, path in self.paths.items():
            try:
                self._good[name] = read_yaml(path, must_exist=name == "models")
            except (OSError, ValueError) as e:
                why = e.strerror if isinstance(e, OSError) else str(e)
                broken.append(Problem(os.path.basename(path), "", "", f"{why}; what was last good stays in force"))
        settings = self._parse(self._good["settings"])
        models, wrong = self._catalog_locked(self._good["overrides"], settings)
        layout, wrong_layout = parse_layout(self._good["services"], self.sparks, settings, os.path.basename(self.paths["services"]))
        shown, hidden = ({k: m for k, m in models.items() if m.hidden is which} for which in (False, True))
        self.current = Config(settings, self.sparks, shown, layout, (*broken, *wrong, *wrong_layout), hidden)
        return True

    def _catalog_locked(self, overrides, settings):
        return parse_catalog(self._good["models"], overrides, settings["LOCAL_MODEL_ROOTS"],
                             *(os.path.basename(self.paths[name]) for name in ("models", "overrides")))

    def edit(self, what, change, dry=False):
        """Let change(mapping, Config) alter what stands in a file of ours at this moment, and write it -> (Config before, Config after).

        Raises Refused 409 for a broken file or a name that is taken, 422 for what would bring other problems, 503 if it
        cannot be written, and whatever change raises; then, and if dry, nothing is changed. Blocks for the disk only.
        """
        path, data = os.path.realpath(self.paths[what]), b""         # a symlink stays one
        with self._lock:
            before, empty = self.current, OVERRIDES if what == "overrides" else {}
            try:
                with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
                    data = f.read()
                try:
                    doc = {**{k: type(v)() for k, v in empty.items()}, **{k: v for k, v in parse_yaml(data).items() if v is not None}}
                    require(all(isinstance(doc[k], type(v)) for k, v in empty.items()), "models and knobs must be mappings, hidden a list")
                except ValueError as e:
                    raise Refused(409, what + "_broken", f"{path}: {printable(str(e), 300)}; mend it by hand first", path=path) from None
                was = to_yaml(doc)
                known = self._catalog_locked(doc, before.settings)[1] if empty else []
                change(doc, before)
                now = to_yaml(doc)
                after = self._catalog_locked(doc, before.settings)[1] if empty else []
                if worse := sorted((p for p in after if p not in known), key=lambda p: p.field == "served_names"):
                    _, entry, field, why = worse[-1]
                    code = (409, "name_taken") if field == "served_names" else (422, "bad_field")
                    raise Refused(*code, f"{field or entry}: {why}", field=field or entry.partition(".")[0], problems=list(map(str, worse)))
                require(len(now) <= 1 << 20 and to_yaml(parse_yaml(now.encode())) == now, "too much, or characters that the file cannot hold")
                if dry or now == was:
                    return before, before
                if re.search(r"(^|\s)#", data.decode().removeprefix(self.HEADER), re.M):      # comments of people, about to be lost
                    write_atomic(path + ".bak", data)
                mode = os.stat(path).st_mode & 0o777 if data else 0o600
                write_atomic(path, (self.HEADER + now).encode())
                os.chmod(path, mode)
            except OSError as e:
                raise Refused(503, what + "_unwritable", f"{path} cannot be written: {e.strerror}; nothing is changed: mend that and ask again", path=path) from None
            except (ValueError, RecursionError, yaml.YAMLError) as e:
                raise Refused(422, "bad_field", f"the change cannot be written as YAML: {printable(str(e), 300)}", field="") from None
            self._refresh_locked()
            return before, self.current


# === 6 backends ===============================================================
# Pure builders of shell text. Every value passes quote_arg; templates come from the owner's own YAML file.
# launch-cluster is eugr/spark-vllm-docker's launcher, whose exit codes mean little: what it left is looked at.

# The container's own first process and a Ray cluster's daemons outlive the engine, so they do not count as one.
ENGINE_ALIVE = ("docker top {container} -eo pid,args 2>/dev/null | tail -n +2 | grep -Evq "
                "'(sleep infinity|earlyoom|docker-init|tini|ray start|ray::|raylet|gcs_server|/ray/)'")
LAUNCH_CLUSTER = Template(
    stop="cd {launch_dir} && ./launch-cluster.sh {stop_flags} stop",
    launch="cd {launch_dir} && {docker_args} ./launch-cluster.sh {launch_flags} exec {command}",
    logs="docker logs -f -t --since {since} {container} 2>&1",
    alive=ENGINE_ALIVE)
LAUNCHER_IMAGE = "vllm-node"    # what the launcher takes without -t
# Builds `vllm serve`'s parser as vllm/entrypoints/cli/main.py does, but starts nothing. vLLM moves its modules about, hence the three
# verdicts. `parse_args` looks at sys.argv as well.
VLLM_PARSER = """import contextlib, io, json, os, signal, sys

def end(verdict, said):
    os.write(1, ("\\n" + json.dumps({"verdict": verdict, "said": str(said)[-2000:]}) + "\\n").encode())
    os._exit(0)

signal.alarm(50)
argv, said = sys.argv[1:], io.StringIO()
sys.argv = ["vllm", *argv]
try:
    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:
        from vllm.utils import FlexibleArgumentParser
    from vllm.entrypoints.cli.serve import cmd_init
    command, parser = cmd_init()[0], FlexibleArgumentParser(prog="vllm")
    command.subparser_init(parser.add_subparsers(required=True, dest="subparser"))
except BaseException as e:
    end("unknown", repr(e))
try:
    with contextlib.redirect_stderr(said):
        command.validate(parser.parse_args(argv))
except SystemExit as e:
    end("rejected" if e.code else "ok", said.getvalue().partition(": error: ")[2])
except (ValueError, TypeError) as e:
    end("rejected", e)
except BaseException as e:
    end("unknown", repr(e))
end("ok", "")
"""
# What the launcher must understand for us to drive it; learned by reading it, since versions differ.
LAUNCHER_NEEDS = {"--solo": "--solo", "-d exec": "dispatched in background"}


def knob_args(knobs):
    """((flag, value), …) -> argv: scalar `--k v`, true `--k`, false nothing, list `--k a b`, mapping `--k '{json}'`."""
    argv = []
    for name, value in knobs:
        values = value if isinstance(value, (list, tuple)) else [value]
        words = [json.dumps(v, ensure_ascii=False) if isinstance(v, (dict, list)) else str(v) for v in values]
        if value is True:
            argv.append(f"--{name}")
        elif value is not False and value is not None:
            # argparse would take a value that starts with a dash for another flag
            argv += [f"--{name}={words[0]}"] if len(words) == 1 and words[0].startswith("-") else [f"--{name}", *words]
    return argv


def engine_args(model, slot, template=""):
    """Everything after `vllm serve MODEL`, less what a command template places itself ({served_names}, {port})."""
    given = {k.replace("_", "-") for k, _ in model.knobs}
    argv = [] if "{served_names}" in template else ["--served-model-name", *model.served_names]
    argv += [] if "{port}" in template else ["--port", str(slot.port)]
    if model.mode == "cluster" and len(slot.hosts) > 1 and not given & {"tensor-parallel-size", "tp", "pipeline-parallel-size"}:
        argv += ["--tensor-parallel-size", str(len(slot.hosts))]        # over all Sparks, unless the knobs say how
    return [*argv, *knob_args(model.knobs), *model.args]


def fill(template, words):
    """Substitute {words} in one pass, so that a value which looks like a word is not substituted again; other braces stay."""
    return re.sub(r"\{([a-z_]+)\}", lambda m: words.get(m[1], m[0]), template)


def template_words(model, slot, template):
    """The {words} of a command template for model, each value quoted."""
    return {"model": quote_arg(model.source), "container": quote_arg(slot.container), "port": quote_arg(slot.port),
            "served_names": quote_all(model.served_names), "extra_args": quote_all(engine_args(model, slot, template.launch)),
            "env": " ".join("-e " + quote_arg(f"{k}={v}") for k, v in model.env),
            "mounts": "-v " + quote_arg(f"{model.local_path}:{model.local_path}") if model.local_path else ""}


def launcher_words(model, slot, launch_dir, flags):
    """The {words} of LAUNCH_CLUSTER for model; flags are the options that this Spark's launcher knows. Raises ValueError."""
    # the launcher splits its docker arguments, and reads them again in a shell on the workers
    require(re.fullmatch(r"[\w./+@=-]*", model.local_path), "local_path: launch-cluster.sh cannot mount a path with spaces or shell "
            "characters; rename the directory, or give the slot a command template as its backend")
    mount = quote_arg(f"-v {model.local_path}:{model.local_path}")
    solo = ["--solo"] if model.mode == "solo" or len(slot.hosts) == 1 else []
    named = ["--name", slot.container] if "--name" in flags or slot.container != "vllm_node" else []
    image = ["-t", model.image] if model.image else []
    # `env` because bash would not take a quoted NAME=value for an assignment
    env = ["env", *(f"{k}={v}" for k, v in model.env)] if model.env else []
    return {"launch_dir": quote_path(launch_dir), "container": quote_arg(slot.container),
            "docker_args": f"VLLM_SPARK_EXTRA_DOCKER_ARGS={mount}" if model.local_path else "",
            "launch_flags": quote_all([*solo, *named, *image, "-d"]),
            "command": quote_all([*env, "vllm", "serve", model.source, *engine_args(model, slot)])}


def build_launch_command(model, slot, launch_dir="~/spark-vllm-docker", flags=frozenset(("--name",)), template=None):
    """The shell text that launches model on slot's head: with launch-cluster.sh, or with a command template."""
    if template:
        return fill(template.launch, template_words(model, slot, template))
    return fill(LAUNCH_CLUSTER.launch, launcher_words(model, slot, launch_dir, flags))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything needed to launch, watch and stop one engine; journaled, so that a restart or a rollback can."""
    slot: str
    model: str                  # catalog key
    served_names: tuple
    hosts: tuple                # names of the Sparks it uses, head first
    port: int
    container: str
    backend: str
    launch: str                 # shell text, run on the head
    shown: str                  # the same with secrets masked, for people
    stop: str                   # shell text that ends it
    logs: str                   # shell text with a NUL where the time of the launch goes, or blank
    alive: str                  # shell text, or blank
    need_gb: float = 0          # GiB per Spark that must be free before the launch; 0 = unknown
    weights_gb: float = 0       # GiB of all its weights; 0 = unknown
    hidden: tuple = ()          # secrets of its model as it was then


def stop_command(slot, config, wide):
    """The shell text that stops what runs in the slot; wide: a cluster may be there, so the launcher must visit every Spark."""
    if slot.backend != "launch-cluster":
        return fill(config.layout.backends[slot.backend].stop, {"container": quote_arg(slot.container), "port": quote_arg(slot.port)})
    return fill(LAUNCH_CLUSTER.stop, {"launch_dir": quote_path(config.settings["LAUNCH_DIR"]),
                                      "stop_flags": ("" if wide else "--solo ") + "--name " + quote_arg(slot.container)})


def make_plan(model, slot, config, flags=frozenset(("--name",)), need_gb=0, weights_gb=0):
    """Model + slot -> Plan. Raises ValueError for what cannot be launched."""
    settings, cluster = config.settings, slot.backend == "launch-cluster"
    template = LAUNCH_CLUSTER if cluster else config.layout.backends[slot.backend]
    words = launcher_words(model, slot, settings["LAUNCH_DIR"], flags) if cluster else template_words(model, slot, template)
    # since is known only when the engine starts; the other words are quoted text that may look like a word
    logs = "\0".join(fill(part, words) for part in template.logs.split("{since}"))
    launch, hidden = build_launch_command(model, slot, settings["LAUNCH_DIR"], flags, None if cluster else template), sorted(model.secrets())
    return Plan(slot.name, model.key, model.served_names, slot.hosts if model.mode == "cluster" else slot.hosts[:1],
                slot.port, slot.container, slot.backend, launch, hide(launch, hidden), stop_command(slot, config, model.mode == "cluster"), logs,
                fill(template.alive, words), need_gb, weights_gb, tuple(hidden))


# --- scripts; each is POSIX sh, runs on one Spark, and may be run twice without harm

def begin_once(name, command):
    """Shell text that begins command at most once, and sets $d: where its pid, its output (out) and at last its exit code (rc) are."""
    # Whoever makes the directory of that name begins. The command runs in a session of its own with its output in that
    # directory, so that neither a dropped ssh nor our own death stops it half-way.
    inner = f'echo $$ >"$1/pid"; ( {command}\n) >"$1/out" 2>&1 </dev/null; echo $? >"$1/tmp"; mv "$1/tmp" "$1/rc"'
    return f"""d="$HOME/.cache/sparkctl/"{quote_arg(name)}
mkdir -p "$HOME/.cache/sparkctl" || exit 70
if mkdir "$d" 2>/dev/null; then
  find "$HOME/.cache/sparkctl" -mindepth 1 -maxdepth 1 -mtime +7 -exec rm -rf {{}} + 2>/dev/null
  date -u +%Y-%m-%dT%H:%M:%S.%NZ >"$d/since"
  $(command -v setsid) sh -c {quote_arg(inner)} sh "$d" </dev/null >/dev/null 2>&1 &
fi
"""


def launch_once_script(swap_id, command):
    """Launch at most once; prints `since TIME` (the Spark's clock), then the launcher's output, and ends with its exit code."""
    return begin_once(swap_id, command) + """i=0
while [ ! -e "$d/rc" ]; do
  sleep 0.1; i=$((i+1))
  if [ $i -gt 30 ] && ! kill -0 "$(cat "$d/pid" 2>/dev/null)" 2>/dev/null && [ ! -e "$d/rc" ]; then
    echo "the launch was interrupted before it ended"; exit 75
  fi
done
echo "since $(cat "$d/since")"; cat "$d/out"
r=$(cat "$d/rc"); [ "$r" != 255 ] || r=254
exit "$r"
"""


def end_launch_script(swap_id):
    """End what begin_once began under that name, if it is still at work."""
    return f"""d="$HOME/.cache/sparkctl/"{quote_arg(swap_id)}
p=$(cat "$d/pid" 2>/dev/null)
[ -n "$p" ] && [ ! -e "$d/rc" ] || exit 0
kill -s TERM -- "-$p" 2>/dev/null || kill -s TERM "$p" 2>/dev/null; sleep 0.3; kill -s KILL -- "-$p" 2>/dev/null
exit 0
"""


def alive_script(alive):
    """Exit 0 while the engine's process lives, by the template's own word."""
    return f"a=$({alive or ':'}\n) 2>/dev/null && [ \"$a\" != false ]"


def follow_script(plan, since):
    """The engine's log on stdout; on stderr `beat` twice a second, and at last `dead [exit code|gone]`."""
    # the beats tell a quiet engine from a lost connection, and make the script end when nobody reads it any more
    # an engine that the kernel ended says nothing: the kernel's own log does, to members of adm or systemd-journal
    kernel = (f'timeout 3 journalctl -k -q --no-pager -o cat --since "@$(date -d {quote_arg(since)} +%s)" 2>/dev/null | '
              "grep -E 'NV_ERR_NO_MEMORY|oom-killer|Out of memory' | tail -n 3 | sed 's/^/kernel: /'")
    post_mortem = ""
    if plan.backend == "launch-cluster":
        c = quote_arg(plan.container)
        post_mortem = (f"w=$(docker inspect -f '{{{{.State.Running}}}}' {c} 2>/dev/null); [ \"$w\" = true ] || why=gone; "
                       f"[ -n \"$why\" ] || why=$(docker events --since {quote_arg(since)} --until \"$(date +%s)\" --filter container={c} "
                       "--filter event=exec_die --format '{{.Actor.Attributes.exitCode}}' 2>/dev/null | tail -n 1)")
    logs = plan.logs.replace("\0", quote_arg(since)) or ":"
    return f"""$(command -v setsid) sh -c {quote_arg(logs)} 2>&1 &
p=$!
bye() {{ kill -- "-$p" 2>/dev/null || kill "$p" 2>/dev/null; exit 0; }}
trap bye PIPE HUP TERM INT
n=0 why=
while :; do
  if {alive_script(plan.alive)}; then n=0; else n=$((n+1)); fi
  if [ "$n" -ge 2 ]; then {kernel}; sleep 0.3; {post_mortem or ":"}; echo "dead $why" >&2; bye; fi
  echo beat >&2 || bye
  sleep 0.5
done
"""


def logs_script(container, tail, follow):
    """The last lines of a container's log, 4 MB at most, and with follow those that come, for an hour. Exit 1: there is none."""
    # a byte a second on stderr tells the script, by SIGPIPE, that nobody reads it any more
    c, ask = quote_arg(container), f"docker logs --tail {int(tail)}"
    there = f"docker inspect {c} >/dev/null || exit 1\n"
    return there + (f"""timeout 3600 {ask} -f {c} 2>&1 &
p=$!
bye() {{ kill "$p" 2>/dev/null; exit 0; }}
trap bye PIPE HUP TERM INT
while kill -0 "$p" 2>/dev/null; do echo >&2 || bye; sleep 1; done
""" if follow else f"{ask} {c} 2>&1 | tail -c 4000000\n")


def retire_script(container):
    """Ask the engine in the container to end, and end the container once it has."""
    # The container's first process is `sleep`, which ignores SIGTERM: `docker stop` would wait out its 10 s. Killing
    # it while the engine lives would leak the engine's shared memory (--ipc=host), hence the order.
    c = quote_arg(container)
    ask = 'for d in /proc/[0-9]*; do tr "\\000" " " <"$d/cmdline" 2>/dev/null | grep -q "[v]llm serve" && kill -TERM "${d##*/}"; done; exit 0'
    return f"""t=$(docker ps -a --format '{{{{.Names}}}}') || exit 3
printf '%s\\n' "$t" | grep -Fqx -e {c} || exit 0
docker exec {c} sh -c {quote_arg(ask)} >/dev/null 2>&1
i=0
while [ $i -lt 60 ] && {ENGINE_ALIVE.replace("{container}", c)}; do sleep 0.1; i=$((i+1)); done
[ $i -ge 60 ] || docker kill {c} >/dev/null 2>&1
exit 0
"""


def remove_script(container):
    """Remove what is still there under that name, and exit 0 only when nothing is."""
    c = quote_arg(container)
    return f"""i=0
while :; do
  t=$(docker ps -a --format '{{{{.Names}}}}') || exit 3
  printf '%s\\n' "$t" | grep -Fqx -e {c} || exit 0
  [ $i -lt 50 ] || exit 4
  [ $i -lt 3 ] || docker rm -f {c} >/dev/null 2>&1
  i=$((i+1)); sleep 0.1
done
"""


# --- what a Spark is asked, and how its answer is read: total, since a Spark may answer anything

SMI = "t nvidia-smi --query-{}={} --format=csv,noheader,nounits"
LIGHT_FILES = "/proc/meminfo /proc/pressure/memory"
SPARK_FILES = LIGHT_FILES + (" /proc/loadavg /proc/uptime /sys/class/thermal/thermal_zone*/temp /sys/class/net/*/operstate"
                             " /sys/class/net/*/speed /sys/class/infiniband/*/ports/1/state")
GPU_CELLS = ("utilization.gpu", "power.draw", "temperature.gpu", "clocks.current.sm", "driver_version")
FAILURES = {124: "hangs", 137: "hangs", 126: "cannot be run", 127: "is not there"}       # exit codes of timeout(1)


def spark_script(light=False):
    """One look at a Spark, without root: files as `path:line`, then after `@part` what a program said, `@end` at last.

    Any part may be missing; a program that hangs is ended, and one that fails is told as `@! program exit-code`. light:
    memory, pressure and GPU only. It runs every few seconds, hence two greps instead of a cat for each file.
    """
    script = f"""t() {{ timeout -k 1 3 "$@" 2>&1 </dev/null || echo "@! $1 $?"; }}
grep -Hs '' {LIGHT_FILES if light else SPARK_FILES}
echo @gpu; {SMI.format("gpu", ",".join(GPU_CELLS))}
"""
    # a process's container stands in its cgroup's name; anon and shmem are a container's own memory, without page cache
    return script + ("" if light else f"""a=$({SMI.format("compute-apps", "pid,used_memory")}); echo @apps; printf '%s\\n' "$a"
f=
while IFS=' ,' read -r p m; do case $p in ''|*[!0-9]*) ;; *) f="$f /proc/$p/cgroup" ;; esac; done <<E
$a
E
c=/sys/fs/cgroup
echo @groups; grep -HsE 'docker|^(anon|shmem) ' $f $c/system.slice/docker-*.scope/memory.stat $c/docker/*/memory.stat
echo @docker; t docker ps -a --no-trunc --format '{{{{.ID}}}} {{{{.Names}}}} {{{{.Status}}}}'
echo @df; t df -Pk "${{HF_HOME:-$HOME/.cache/huggingface}}" "$HOME" /var/lib/docker
""") + "echo @end\nexit 0\n"


def figure(cell):
    """The number in a cell, or None: on GB10 nvidia-smi says [N/A] or Not Supported in many."""
    m = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,9})?)\s*", cell, re.ASCII)
    return float(m[1]) if m else None


def parse_meminfo(lines):
    """Lines of /proc/meminfo -> {name: GiB}."""
    return {m[1]: int(m[2]) / (1 << 20) for line in lines if (m := re.fullmatch(r"(\w+):\s+(\d{1,15}) kB", line, re.ASCII))}


def parse_apps(lines):
    """`pid, MiB` lines of nvidia-smi -> {pid: GiB, None where it does not tell}. On GB10 this works, unlike the GPU's own memory."""
    found = filter(None, (re.fullmatch(r"(\d{1,10}),([^,]*)", line.strip(), re.ASCII) for line in lines))
    return {int(m[1]): None if (mib := figure(m[2])) is None else mib / 1024 for m in found}


def parse_spark(out):
    """spark_script's output -> what the Spark told; None, or nothing, for what it did not.

    `hangs`: the part it came no further than. `failed`: {program: (what of it, its last words)}.
    """
    part, parts, files, failed = "files", collections.defaultdict(list), collections.defaultdict(list), {}
    for line in out[:1 << 20].splitlines()[:4000]:
        if m := re.fullmatch(r"@! (nvidia-smi|docker|df) (\d{1,3})", line, re.ASCII):
            if m[1] != "df" or int(m[2]) in FAILURES:       # df fails if but one of its paths is not there
                failed[m[1]] = FAILURES.get(int(m[2]), "fails"), printable(" ".join(parts[part][-1:]), 200)
            continue
        part = line[1:20] if line.startswith("@") else part
        parts[part] += [] if line.startswith("@") else [line]
    for line in parts["files"] + parts["groups"]:
        path, _, said = line.partition(":")
        files[path[:200]].append(said)          # bounded, since a pattern may cost the square of its length
    named = lambda pattern: [(m[1], said) for path, said in files.items() if (m := re.search(pattern + "$", path, re.ASCII))]
    words = lambda pattern: [figure(word) for _, said in named(f"({pattern})") for word in said[0].split()] or [None]
    gpu = next((cells for line in parts["gpu"] if len(cells := line.split(",")) == len(GPU_CELLS)), [])
    cells = [v if v is not None and v <= most else None for v, most in zip((*map(figure, gpu), *[None] * 4), (100, 9999, 200, 99999))]
    memory = parse_meminfo(line for _, said in named("(/meminfo)") for line in said)
    pressure = re.search(r"some avg10=(\d{1,3}\.\d\d)", " ".join(said[0] for _, said in named("(/pressure/memory)")))
    container = r"docker[-/]([0-9a-f]{64})"
    rows = filter(None, (re.fullmatch(r"([0-9a-f]{64}) ([\w.-]{1,128}) (.*)", line, re.ASCII) for line in parts.get("docker", ())))
    heat = [t / 1000 for _, said in named(r"/thermal_zone(\d+)/temp") if (t := figure(said[0])) is not None]
    df = [row for line in parts["df"] if len(row := [*map(figure, line.split())]) > 5 and None not in row[1:4]]
    speeds = dict(named("/net/([^/]*)/speed"))
    return {
        "memory": {k: v for k, v in memory.items() if v <= min(1 << 20, memory.get("MemTotal", 0)) or k.startswith("Swap")},
        "pressure": float(pressure[1]) if pressure else None,
        "gpu": {**dict(zip(("busy", "power_w", "temperature_c", "clock_mhz"), cells)),
                "driver": printable(gpu[4].strip(), 40)} if gpu else None,
        "apps": parse_apps(parts["apps"]) if "apps" in parts and "nvidia-smi" not in failed else None,
        "container_of": {int(pid): m[1] for pid, said in named(r"/(\d{1,10})/cgroup") if (m := re.search(container, " ".join(said)))},
        "container_gb": {name: sum(figure(line.split(" ")[-1]) or 0 for line in said) / GIB
                         for name, said in named(container + r"[^/]*/memory\.stat")},
        "containers": {m[1]: (m[2], printable(m[3], 200)) for m in rows} if "docker" in parts and "docker" not in failed else None,
        "load": words("/loadavg")[0], "uptime_s": words("/uptime")[0], "temperature_c": max(heat, default=None),
        "disk": {"total_gb": round(df[0][1] / (1 << 20)), "free_gb": round(df[0][3] / (1 << 20), 1)} if df else None,
        "room_gb": min((row[3] / (1 << 20) for row in df), default=None), "failed": failed,
        "links": [{"name": name, "state": printable(said[0], 20), "mbit": figure(speeds.get(name, [""])[0])}
                  for name, said in sorted(named(r"/net/(e[\w.-]{1,15})/operstate"))[:32]],
        "fabric": sum("ACTIVE" in said[0] for _, said in named(r"(/ports/1/state)")), "hangs": None if part == "end" else part}


def ledger(facts, owners):
    """Where a Spark's memory is, GiB; its parts add up to the total, what nothing explains being `unknown`. None if it does not tell.

    owners: {container: ("engines" or "services", name)}. A container's memory is its own, anonymous and shared, and what
    its processes hold on the GPU; None where the GPU does not tell. Page cache is given back when needed.
    """
    memory, apps = facts["memory"], facts["apps"]
    if not {"MemTotal", "MemAvailable", "MemFree"} <= memory.keys():
        return None
    cache = sum(memory.get(name, 0) for name in ("Buffers", "Cached", "SReclaimable")) - memory.get("Shmem", 0)
    cache = min(max(0.0, cache), memory["MemTotal"])
    use, dark = collections.Counter(facts["container_gb"]), set()
    for pid, gb in (apps or {}).items():
        use[facts["container_of"].get(pid, "")] += gb or 0
        dark |= {facts["container_of"].get(pid, "")} if gb is None else set()
    parts, known = {"engines": {}, "services": {}, "others": {}}, facts["containers"] or {}
    for container, gb in use.items():
        name = known.get(container, (container[:12] or "processes on the GPU",))[0]
        kind, name = owners.get(name, ("others", name))
        parts[kind][name] = None if container in dark or apps is None and kind == "engines" else round(gb, 2)
    told = sum(gb for part in parts.values() for gb in part.values() if gb)
    rest = memory["MemTotal"] - memory["MemFree"] - cache - told
    sums = {"total": memory["MemTotal"], "available": memory["MemAvailable"], "free": memory["MemFree"], "page_cache": cache,
            "unknown": max(0.0, rest)}
    return {**{name + "_gb": round(gb, 2) for name, gb in sums.items()}, **parts}


def owners_of(config, spark):
    """Whose the containers on a Spark are -> {container: (part of the ledger, name)}."""
    layout = config.layout
    return {**{s.container: ("services", s.name) for s in layout.services.values() if s.host == spark and s.container},
            **{s.container: ("engines", s.name) for s in layout.slots.values() if spark in s.hosts}}


def holders(told, without=""):
    """Who holds how much of a Spark's memory, in GiB, by its ledger; whose part is not known, and who is named without, is left out."""
    return {who: gb for part in ("engines", "services", "others") for who, gb in (told or {}).get(part, {}).items() if gb and who != without}


# systemd removes the shared memory of a user who is no system user and has no session any more (logind.conf(5), RemoveIPC).
SESSION_TRAP = """[ "$(id -u)" -lt 1000 ] || [ -e "/var/lib/systemd/linger/$(id -un)" ] || timeout 5 busctl get-property org.freedesktop.login1 \\
  /org/freedesktop/login1 org.freedesktop.login1.Manager RemoveIPC 2>/dev/null | sed -n 's/^b true/removes_ipc yes/p'"""
# Sets $h to the Hugging Face cache, as huggingface_hub's constants.py finds it.
HUB = "h=${HF_HUB_CACHE:-${HF_HOME:-$HOME/.cache/huggingface}/hub}\n"
# A shell function: `snapshot REPO` sets $s to the directory of files that a load of the repo would read.
SNAPSHOT = """snapshot() {
  s=$1/snapshots/$(head -c 100 "$1/refs/main" 2>/dev/null); [ -e "$s/config.json" ] || s=$(ls -td "$1"/snapshots/*/ 2>/dev/null | head -n 1)
}
"""
# A shell function: `loaded SNAPSHOT` prints the names of the files that vLLM loads: those of the index, else all of one kind
# (vllm/model_executor/model_loader/default_loader.py).
WEIGHTS_LOADED = r"""loaded() {
  x=$1/model.safetensors.index.json; [ -e "$x" ] || x=$(ls "$1"/*.index.json 2>/dev/null | head -n 1)
  if [ -n "$x" ]; then grep -oE '"[^"]+\.(safetensors|bin)"' "$x" | tr -d '"' | sort -u
  else for e in safetensors bin gguf pt pth; do ls "$1" 2>/dev/null | grep "\.$e$" && break; done; fi
}
"""
# A shell function: `lacks SNAPSHOT [REPO]` prints `missing NAME` for all that keeps weights from being complete. An unfinished
# file counts until its blob is there: a 2.x download leaves it behind when it is killed, and takes another name the next time.
# A name never stands in a line as it is: what no file of a repo needs becomes `?`, and every line has its prefix.
WEIGHTS_COMPLETE = WEIGHTS_LOADED + r"""lacks() {
  { ls "$1" 2>/dev/null | grep -qE '^(config|params)\.json$|\.gguf$' || echo config.json
    [ -n "$(loaded "$1")" ] || echo weights
    loaded "$1" | while IFS= read -r f; do [ -e "$1/$f" ] || printf '%s\n' "$f"; done
    ls "$1" 2>/dev/null | sed -nE 's/^(.*)-[0-9]+(-of-([0-9]+)\.(safetensors|bin|gguf))$/\3 \1-*\2/p' |
      sort | uniq -c | awk '$1 < $2 + 0 {print $3}'
    for f in "$1"/*; do [ -e "$f" ] || [ ! -L "$f" ] || printf '%s\n' "${f##*/}"; done
    [ -z "$2" ] || for f in "$2"/blobs/*.incomplete; do b=${f##*/}; [ ! -e "$f" ] || [ -e "$2/blobs/${b%%.*}" ] || printf '%s\n' "$b"; done
  } | LC_ALL=C tr -c 'A-Za-z0-9._*/\n-' '?' | cut -c 1-200 | sort -u | head -n 50 | sed 's/^/missing /'
}
"""


def repo_dir(repo):
    """The name of a repo's directory in the cache (huggingface_hub file_download.py, repo_folder_name)."""
    return "models--" + repo.replace("/", "--")


def facts_script(model, slot, config, head):
    """One look at a Spark before a swap: lines `name value`, read by parse_facts. Changes nothing; a part that hangs is left out after 5 s."""
    lines = ["date +'clock %s.%N'", SESSION_TRAP]
    if head:
        lines.append(f"awk '$4 == \"0A\" && $2 ~ /:{slot.port:04X}$/ {{print \"listening {slot.port}\"; exit}}' "
                     "/proc/net/tcp /proc/net/tcp6 2>/dev/null")
    if slot.backend == "launch-cluster":
        c = quote_arg(slot.container)
        image = model and f"docker image inspect -f 'image {{{{.Id}}}}' {quote_arg(model.image or LAUNCHER_IMAGE)} 2>/dev/null"
        lines.append(f"""docker() {{ timeout 5 docker "$@"; }}
{ENGINE_ALIVE.replace('{container}', c)} && echo engine alive
{image or ":"}""")
    if head and slot.backend == "launch-cluster":
        lines.append(f"""if cd {quote_path(config.settings["LAUNCH_DIR"])} 2>/dev/null && [ -x launch-cluster.sh ]; then echo launcher yes
grep -oE -e '--[a-z][a-z-]+|dispatched in background' launch-cluster.sh | sort -u | sed 's/^/flag /'
sed -n 's/^ *CONTAINER_NAME=/env_container /p' .env 2>/dev/null
else echo launcher no; fi""")
    if model:
        lines += [HUB, SNAPSHOT, WEIGHTS_COMPLETE, f"r=$h/{quote_arg(repo_dir(model.repo))}; snapshot \"$r\"" if model.repo else f"s={quote_arg(model.local_path)} r=",
                  r"""if [ -n "$s" ] && [ -d "$s" ]; then printf 'weights %s\nreal %s\n' "$s" "$(readlink -f "$s")"; lacks "$s" "$r"
echo weights_kb $(cd "$s" && loaded . | tr '\n' '\0' | xargs -0 -r du -cLk --apparent-size -- 2>/dev/null | tail -n 1 | cut -f 1); fi"""]
    return "\n".join([*lines, "echo @@", spark_script()])


def parser_script(image, argv):
    """Ask vLLM's own parser in the image about argv -> its verdict as the last line, read by parse_verdict."""
    return (f"printf %s {quote_arg(VLLM_PARSER)} | timeout 55 docker run --rm -i --init --gpus all --network none --pull never --entrypoint= "
            f"{quote_arg(image)} python3 - {quote_all(argv)}")


def parse_verdict(result):
    """A Result of parser_script -> (ok | rejected | unknown, what vLLM said)."""
    with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        got = json.loads(result.out.strip().splitlines()[-1])
        return choice("ok", "rejected", "unknown")(got["verdict"]), printable(" ".join(got["said"].split()), 500)
    return "unknown", printable((result.err.strip().splitlines() or [result.kind.replace("_", " ")])[-1], 200)


def parse_facts(out):
    """facts_script's output -> ({name: [values]}, what parse_spark makes of the rest); lines that do not fit are passed over."""
    facts, (told, _, rest) = collections.defaultdict(list), out.partition("\n@@\n")
    for line in told[:1 << 20].splitlines()[:5000]:
        name, _, value = line.strip().partition(" ")
        facts[name].append(value.strip())
    return facts, parse_spark(rest)


# === 7 engine =================================================================
# What a vLLM says of itself: over HTTP (the only thing that makes it `ready`) and in its log (progress and causes).
# Log lines and answers are as vLLM 0.11 to 0.33 wrote them.


class Probe(NamedTuple):
    """What a port answered. state: serving, silent (nothing listens or answers), loading (up, not healthy), foreign."""
    state: str
    served: tuple = ()          # ids of /v1/models, first one first
    detail: str = ""


TLS = functools.cache(ssl.create_default_context)       # reads the system's certificates once
EMPTY = ("connection refused", "stopped")       # by these details a silent port is known to have no engine


class Endpoint(NamedTuple):
    host: str
    port: int
    key: str = ""
    tls: bool = False

    @property
    def url(self):
        return f"http{'s' if self.tls else ''}://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"

    def request(self, method, path, body=None, timeout_s=2.0, cancel=None):
        """(status, 4 MiB at most) of one request, within timeout_s however it drips. Raises OSError, HTTPException or Cancelled."""
        form = isinstance(body, bytes)
        deadline, data, body = time.monotonic() + timeout_s, bytearray(), body if form else b"" if body is None else to_json(body)
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.url.partition('//')[2]}", "Connection: close",
                 f"Content-Type: {'multipart/form-data; boundary=sparkctl' if form else 'application/json'}",
                 f"Content-Length: {len(body)}", *([f"Authorization: Bearer {self.key}"] if self.key else [])]
        with contextlib.ExitStack() as stack:
            s = stack.enter_context(socket.create_connection((self.host, self.port), min(timeout_s, 5)))
            s = stack.enter_context(TLS().wrap_socket(s, server_hostname=self.host)) if self.tls else s
            s.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body)
            while len(data) < 4 << 20:
                s.settimeout(max(0.001, min(0.1, deadline - time.monotonic())))
                try:
                    chunk = s.recv(65536)
                except TimeoutError:
                    if cancel and cancel.is_set():
                        raise Cancelled() from None
                    chunk = None
                if chunk == b"":
                    break
                data += chunk or b""
                if time.monotonic() >= deadline:
                    raise TimeoutError()
        # http.client parses what it reads from a socket: bytes in a socket's clothes
        reply = http.client.HTTPResponse(types.SimpleNamespace(makefile=lambda mode: io.BytesIO(data)), method=method)
        reply.begin()
        try:
            return reply.status, reply.read()
        except OverflowError:
            raise ValueError("a length that cannot be") from None


def endpoint_of(place, hosts, settings):
    """Where the engine of a Slot or a Plan answers."""
    return Endpoint(hosts.address(place.hosts[0]), place.port, settings["VLLM_API_KEY"])


def why_silent(e):
    """(state of a service, why) of what was raised when it was asked."""
    if getattr(e, "errno", 0) in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return "unknown", "sparkctl itself ran out of file descriptors or memory"
    return next((told for kind, *told in (
        (ConnectionRefusedError, "down", "connection refused"), (TimeoutError, "unreachable", "no answer in time"),
        (ssl.SSLCertVerificationError, "unknown", "nobody vouches for its certificate"), (ssl.SSLError, "unknown", "what answers is not HTTPS"),
        (socket.gaierror, "unreachable", "its name is not known"), ((ConnectionError, http.client.RemoteDisconnected), "down", "hangs up"),
        (OSError, "unreachable", "no answer"), (Exception, "unknown", "what answers is not HTTP")) if isinstance(e, kind)))


def probe_vllm_endpoint(endpoint, timeout_s=2.0):
    """Ask an engine /health, then /v1/models -> Probe. Never raises; takes twice timeout_s at most."""
    # vLLM refuses connections until it is ready, answers /health 503 only when its engine is dead, and guards /v1
    # but not /health with its key (vllm/entrypoints/serve/instrumentator/health.py)
    try:
        status, _ = endpoint.request("GET", "/health", timeout_s=timeout_s)
        if status == 503:
            return Probe("loading", detail="/health says 503: its engine is dead or not up")
        status_models, body = endpoint.request("GET", "/v1/models", timeout_s=timeout_s)
        if status_models in (401, 403):
            return Probe("foreign", detail="/v1/models refuses our key: set VLLM_API_KEY to the engine's key")
        cards = json.loads(body)["data"] if status_models == 200 else None
        served = tuple(printable(card["id"], 300) for card in cards[:64] if isinstance(card["id"], str) and card["id"]) if cards else ()
        said = f"/health says {status}" if status != 200 else f"/v1/models says {status_models}" if status_models != 200 else "it serves no model"
        return Probe("serving", served) if status == 200 and served else Probe("foreign", served, said)
    except OSError as e:
        state, why = why_silent(e)
        return Probe("unknown" if state == "unknown" else "silent", detail=why)
    except (http.client.HTTPException, ValueError, KeyError, TypeError, RecursionError):
        return Probe("foreign", detail="what answers is not a vLLM")


def service_place(service, hosts, settings):
    """(Endpoint, path before its own) at which a service answers."""
    key = settings[KINDS[service.kind].key] if KINDS[service.kind].key else ""
    if service.host and service.port:
        return Endpoint(hosts.address(service.host), service.port, key), ""
    place = urllib.parse.urlsplit(service.url)
    tls = place.scheme == "https"
    return Endpoint(place.hostname, place.port or (443 if tls else 80), key, tls), place.path.rstrip("/")


def probe_service(service, endpoint, path="", timeout_s=3.0):
    """Ask a service for its health and what it has -> (state, detail, facts). Never raises.

    States: serving, loading, down (nothing listens, or its engine is dead), unreachable, unknown (an answer that says neither).
    """
    if service.kind == "vllm":
        probe = probe_vllm_endpoint(endpoint)
        silent = "down" if probe.detail == "connection refused" else "unreachable"
        state = {"serving": "serving", "loading": "down", "silent": silent}.get(probe.state, "unknown")
        return state, "" if probe.served else probe.detail, {"model": probe.served[0], "names": [*probe.served]} if probe.served else {}
    kind, facts, state = KINDS[service.kind], {}, None
    clean = lambda value: printable(value, 200) if isinstance(value, str) else [printable(v, 100) for v in value[:100] if isinstance(v, str)]
    try:
        status, _ = endpoint.request("GET", path + service.health, timeout_s=timeout_s)
        well = 200 <= status < 300
        state, detail = "serving" if well else kind.busy if status == 503 else "unknown", "" if well else f"{service.health} says {status}"
        for ask in kind.ask:
            status, body = endpoint.request("GET", path + ask, timeout_s=timeout_s)
            # JSON of another shape tells nothing
            with contextlib.suppress(ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
                facts = facts or {k: clean(v) for k, v in kind.tell(json.loads(body)).items() if v} if status == 200 else facts
            detail = f"{ask} says {status}: set {kind.key}" if status in (401, 403) and kind.key else detail
    except (OSError, ValueError, http.client.HTTPException) as e:
        state, detail = (state, detail or f"{ask}: {why_silent(e)[1]}") if state else why_silent(e)
    return state, detail, facts


def do_work(endpoint, path, requests, timeout_s, cancel=None):
    """Ask for real work, in turn, until one is work that is done there -> (path, status, body, whether it shows work). Raises as Endpoint.request does."""
    refusals = []
    for ask, body, shows in requests:
        status, said = endpoint.request("GET" if body is None else "POST", path + ask, body, timeout_s, cancel)
        with contextlib.suppress(ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError):    # not JSON, or of another shape
            if 200 <= status < 300 and shows(said):
                return ask, status, said, True
        refusals.append((ask, status, said, False))
        if status not in (400, 404, 405, 501):              # by which a vLLM tells that its model does other work
            return refusals[-1]
    return refusals[0]


def ask_for_work(kind, endpoint, path, facts, timeout_s, health=""):
    """One real request to a service of that kind -> how it answered. Raises Refused 502."""
    try:
        ask, status, _, good = do_work(endpoint, path, KINDS[kind].real(facts) or ((health, None, lambda said: True),), timeout_s)
    except (OSError, ValueError, http.client.HTTPException) as e:
        raise Refused(502, "unhealthy", why_silent(e)[1]) from None
    if not good:
        raise Refused(502, "unhealthy", f"{ask} says {status}" + (" and not what it should" if 200 <= status < 300 else ""))
    return f"{ask} answered"


class Vitals(NamedTuple):
    """What a vLLM's /metrics last told, and what follows from the time before."""
    at: float                   # monotonic
    told: dict                  # running, waiting, kv_use, prompt_tokens, generation_tokens
    facts: dict                 # for people: running, waiting, kv_use, tokens_per_s, prompt_tokens_per_s
    frozen: int = 0             # looks in a row with requests running and no token counted


# vllm/v1/metrics/loggers.py; summed over engines, but for how full the fullest cache is
VLLM_METRICS = {"vllm:num_requests_running": "running", "vllm:num_requests_waiting": "waiting", "vllm:kv_cache_usage_perc": "kv_use",
                "vllm:prompt_tokens_total": "prompt_tokens", "vllm:generation_tokens_total": "generation_tokens"}


def parse_vllm_metrics(text_):
    """What /metrics says of the names in VLLM_METRICS -> {ours: number}."""
    found = collections.defaultdict(list)
    for name, value in re.findall(r"^(vllm:\w{1,60})(?:\{.*\})? (?:(\d{1,20}(?:\.\d{1,20})?(?:e[+-]?\d\d?)?)|\S+)$", text_, re.M | re.A):
        found[VLLM_METRICS.get(name)].append(float(value or "nan"))        # of one engine that counts wrong no sum is known
    told = {name: max(values) if name == "kv_use" else sum(values) for name, values in found.items() if name and not any(map(math.isnan, values))}
    return {name: min(1e15, value) for name, value in told.items() if name != "kv_use" or value <= 1}


def vitals_after(old, told, now):
    """The Vitals at now, monotonic. A counter that is lower than before began again, nobody knows when."""
    facts = {name: told[name] for name in ("running", "waiting", "kv_use") if name in told}
    for name in ("prompt_tokens", "generation_tokens") if old and now > old.at else ():
        if name in told and told[name] >= old.told.get(name, math.inf):
            facts[name.removeprefix("generation_") + "_per_s"] = round((told[name] - old.told[name]) / (now - old.at), 1)
    tokens = lambda of: [of.get(name) for name in ("prompt_tokens", "generation_tokens")]
    still = old and told.get("running") and "generation_tokens" in told and tokens(told) == tokens(old.told)
    return Vitals(now, told, facts, old.frozen + 1 if still else 0)


LOG_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+[^)]*\)\s*)*")
PROGRESS = (    # (pattern, share of loading when it appears, text); {0} {1} are its groups
    (r"vLLM (?:API )?server version (\S+)|▀▀.*version", 0.01, "Starting vLLM"),
    (r"Resolved architecture: (\w+)", 0.02, "Reading the model's configuration"),
    (r"Initializing a V1 LLM engine", 0.04, "Starting the engine"),
    (r"Starting to load model", 0.06, "Loading weights"),
    (r"Loading weights took", 0.70, "Weights loaded"),
    (r"Model loading took ([\d.]+) GiB", 0.72, "Weights loaded, {0:.3} GiB"),
    (r"Starting torch.compile|Compiling a graph|Dynamo bytecode", 0.75, "Compiling"),
    (r"torch.compile took|Directly load the compiled graph", 0.85, "Compiled"),
    (r"KV cache size: ([\d,]+) tokens", 0.88, "KV cache: {0} tokens"),
    (r"Capturing CUDA graphs", 0.90, "Capturing CUDA graphs"),
    (r"Graph capturing finished", 0.95, "CUDA graphs captured"),
    (r"init engine .* took", 0.96, "Engine initialised"),
    (r"Starting vLLM (?:API )?server", 0.98, "Starting the HTTP server"),
    (r"Application startup complete", 0.99, "Waiting for the engine's first answer"),
)
SHARDS = re.compile(r"^(?P<what>Loading [^:%|]*?(?:shards|loader|Streamer)|Multi-thread loading shards)[^:|]*:\s*(?P<pct>\d+)%.*?\|\s*(?P<done>\d+)/(?P<all>\d+)")
FATAL = (       # (pattern, error code, what happened, what to do); first match in this order wins over later lines
    (r"(?:torch\.(?:cuda\.)?OutOfMemoryError|CUDA out of memory)(?:.*?Tried to allocate ([\d.]+ [GM]iB))?", "out_of_memory",
     "the GPU ran out of memory while loading{0: (it wanted {} more)}",
     "lower gpu-memory-utilization, max-model-len or max-num-seqs, or free memory on the Spark"),
    (r"NV_ERR_NO_MEMORY|invoked oom-killer|Out of memory: Killed process", "out_of_memory", "the Spark ran out of memory, and its kernel ended a process",
     "lower gpu-memory-utilization, or stop what else holds memory there"),
    (r"Failed to load model - not enough GPU memory", "out_of_memory", "the weights do not fit into the GPU memory that is free",
     "free memory on the Spark, or take a smaller or more quantised model"),
    (r"Free memory on device \S+ \(([\d.]+)/([\d.]+) GiB\) on startup is less than desired GPU memory utilization \(([\d.]+), ([\d.]+) GiB\)",
     "out_of_memory", "needs {3} of {1} GB, and {0} GB are free", "lower gpu-memory-utilization from {2}, or stop what else holds memory"),
    (r"No available memory for the cache blocks", "out_of_memory", "the weights left no room for the KV cache",
     "raise gpu-memory-utilization, or lower max-num-batched-tokens"),
    (r"max seq len \((\d+)\).*?\(([\d.]+) GiB KV cache is needed.*?KV cache memory \(([\d.]+) GiB\)(?:.*?maximum model length is (\d+))?",
     "kv_cache_too_small", "one request of {0} tokens needs {1} GB of KV cache, and {2} GB are there",
     "lower max-model-len{3: to {}}, or raise gpu-memory-utilization"),
    (r"Available memory on node \d+ \(([\d.]+)/[\d.]+ GiB\) on kv cache allocation is less than requested memory for kv \(([\d.]+) GiB\)",
     "out_of_memory", "the KV cache asks for {1} GB, and {0} GB are free", "lower kv-cache-memory-bytes"),
    (r"Error in memory profiling", "memory_changed", "another process freed or took memory while vLLM measured it",
     "try again when nothing else starts or stops on the Spark"),
    (r"^vllm(?: serve)?: error: (.*)", "bad_flag", "vLLM refuses its arguments: {0}", "mend the model's knobs or args; this image's vLLM does not take them"),
    (r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \(\D*(\d+)", "bad_flag",
     "max-model-len {0} is more than the model's own {1}", "lower max-model-len to {1}"),
    (r"LocalEntryNotFoundError|Repo id must be in the form|RepositoryNotFoundError|does not appear to have a file named|Can't load the configuration of",
     "weights_missing", "the weights are not on the Spark", "download the model, or mend repo or local_path"),
    (r"Cannot access gated repo|GatedRepoError|(?:401|403) Client Error", "gated_repo", "Hugging Face refuses access to the repo",
     "accept the model's licence and give the Spark an HF_TOKEN"),
    (r"No space left on device", "disk_full", "the Spark's disk is full", "delete models that are not needed"),
    (r"Address already in use", "port_taken", "the engine's port is taken by another process", "stop what listens on the port, or give the slot another"),
    (r"Cannot connect to the Docker daemon|docker: command not found", "docker_down", "docker does not answer on the Spark", "start docker, and let the ssh user use it"),
    (r"(?:Unable to find image|No such image:|pull access denied for) '?([^\s',]+)", "image_missing", "the image {0} is not on the Spark",
     "build or pull the image"),
    (r"Docker image mismatch", "image_mismatch", "the Sparks have different images", "copy the image: ./build-and-copy.sh --copy-to"),
    (r"Command requires (\d+) nodes", "too_few_sparks", "the model wants {0} Sparks", "give the slot more hosts, or lower tensor-parallel-size"),
    (r"EngineCore failed to start|Engine core initialization failed|WorkerProc failed to start|Worker proc .* died unexpectedly",
     "engine_failed", "the engine failed to start", "read the log above for the cause"),         # only a summary, so the last
)


class Signal(NamedTuple):
    """What one log line tells. kind: progress, fatal, or none."""
    kind: str
    fraction: float = 0.0
    text: str = ""
    code: str = ""
    remedy: str = ""
    rank: int = 0               # of a fatal line: the lower, the nearer to the root cause


def _words(form, groups):
    """Fill {0} and the optional {0: text with {} } parts of a message from a match's groups."""
    form = re.sub(r"\{(\d):([^{}]*)\{\}([^{}]*)\}", lambda m: f"{m[2]}{groups[int(m[1])]}{m[3]}" if groups[int(m[1])] else "", form)
    return re.sub(r"\{(\d)(?::\.(\d))?\}", lambda m: (groups[int(m[1])] or "")[:int(m[2]) + 2 if m[2] else None], form)


def classify_log_line(line):
    """One line of an engine's or launcher's log -> Signal. Pure; ERROR alone is not fatal, vLLM logs it in good health."""
    line = LOG_PREFIX.sub("", line[:2000])      # bounded, since some patterns cost the square of a line's length
    if m := SHARDS.search(line):
        done, total = int(m["done"]), max(1, int(m["all"]))
        what = "files" if "shards" in m["what"] else "tensors"
        return Signal("progress", 0.06 + 0.64 * min(1, done / total), f"Loading weights, {done} of {total} {what}")
    for pattern, share, words in PROGRESS:
        if m := re.search(pattern, line):
            return Signal("progress", share, _words(words, m.groups() or ("",)))
    if line.startswith(("WARNING", "INFO")):
        return Signal("none")
    for rank, (pattern, code, what, remedy) in enumerate(FATAL):
        if m := re.search(pattern, line):
            return Signal("fatal", 0.0, _words(what, m.groups())[:400], code, _words(remedy, m.groups()), rank)
    return Signal("none")


# === 8 swap rules =============================================================
# Pure: no thread, clock, file or network. TRANSITIONS is the whole of what may follow what; advance() is the only
# code that assigns a phase; check_swap() holds the invariants and runs after every transition.

PHASES = ("queued", "checking", "draining", "stopping", "launching", "loading", "warming", "ready", "failed", "cancelled", "planned")
TERMINAL = frozenset(("ready", "failed", "cancelled", "planned"))
_END = frozenset(("failed", "cancelled"))
TRANSITIONS = {
    "queued":    frozenset(("checking",)) | _END,
    "checking":  frozenset(("draining", "planned")) | _END,
    "draining":  frozenset(("stopping",)) | _END,
    "stopping":  frozenset(("launching", "ready")) | _END,      # ready: an unload, which launches nothing
    "launching": frozenset(("loading",)) | _END,
    "loading":   frozenset(("warming",)) | _END,
    "warming":   frozenset(("ready",)) | _END,
    "ready":     frozenset(), "failed": frozenset(), "cancelled": frozenset(), "planned": frozenset(),
}


class Check(NamedTuple):
    """One thing looked at before anything is touched. status: ok, warn, fail, skipped."""
    name: str
    status: str
    detail: str
    remedy: str = ""
    numbers: dict | None = None     # what the verdict rests on


def check_swap(s):
    """The invariants, one a line. Raises ValueError: `assert` would vanish under -O."""
    for ok, rule in (
            (s.phase in TRANSITIONS, "the phase is a known one"),
            ((s.ended_at is not None) == (s.phase in TERMINAL), "exactly a terminal swap has an end"),
            (s.phase != "failed" or s.error, "a failed swap says why"),
            (s.phase not in ("launching", "loading", "warming") or s.plan, "what is launched has a plan"),
            (s.phase not in ("launching", "loading", "warming") or s.touched, "nothing is launched before the stop"),
            (s.phase != "planned" or s.dry_run and not s.touched, "only a dry run ends planned, and it touches nothing"),
            (s.model is not None or s.phase not in ("launching", "loading", "warming"), "an unload launches nothing"),
            (not (s.rollback_of and s.rollback), "a rollback does not roll back"),
            (s.phase in TERMINAL or not s.phases or s.phases[-1][2] is None, "the running phase has no duration yet")):
        require(ok, f"swap {s.id} in {s.phase} breaks the rule: {rule}")
    return s


@dataclasses.dataclass(frozen=True)
class Swap:
    """One attempt to make a slot serve a model (model None: nothing). Immutable; shared between threads as it is."""
    id: str
    slot: str
    model: str | None
    from_model: str | None = None
    phase: str = "queued"
    started_at: str = ""
    ended_at: str | None = None
    phases: tuple = ()              # ((phase, started_at, seconds or None), …)
    phase_began: float = 0.0        # Unix time
    fraction: float = 0.0           # of the running phase
    text: str = ""
    eta_seconds: float | None = None
    usual_seconds: float | None = None
    slower: bool = False            # than 1.5 × usual, with no log line for 30 s
    checks: tuple = ()
    commands: tuple = ()
    error: dict | None = None
    holder: str | None = None
    forced: bool = False
    dry_run: bool = False
    restart: bool = False
    rollback: bool = True
    rollback_of: str | None = None
    rollback_id: str | None = None  # of the swap that brings back what served before
    skip_checks: tuple = ()
    note: str = ""
    client: str = ""
    fence: int = 0                  # of the lease that it was started under
    automatic: bool = False         # nobody asked for it just now: a job did
    blackbox: dict | None = None    # Spark that stopped answering meanwhile -> what it told last
    seq: int = 0                    # grows with every change; what long-polls wait on
    # for the journal only
    plan: Plan | None = None
    previous: Plan | None = None    # what was launched before, to go back to
    since: str = ""                 # when the launch began, by the head's clock
    touched: bool = False           # the old engine was told to stop
    cancelling: bool = False
    ending: dict | None = None      # outcome that is decided while the clean-up still runs

    @property
    def holds(self):
        """Whether requests for the slot wait: it does not serve, or will not in a moment."""
        return self.phase not in TERMINAL and (self.phase not in ("queued", "checking") or bool(self.rollback_of or self.previous))

    def public(self):
        """The shape of the API."""
        own = ("plan", "previous", "since", "touched", "cancelling", "ending", "fraction", "text", "phase_began")
        got = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in own}
        got["phases"] = [{"phase": p, "started_at": at, "seconds": s} for p, at, s in self.phases]
        got["progress"] = {"fraction": round(self.fraction, 4), "text": self.text}
        got["checks"] = [c._asdict() for c in self.checks]
        got["cancelling"] = self.cancelling
        return got

    def journal(self):
        return dataclasses.asdict(dataclasses.replace(self, checks=tuple(tuple(c) for c in self.checks)))

    @classmethod
    def from_journal(cls, got):
        """Raises TypeError, ValueError or AttributeError for another shape."""
        plan = functools.partial(restore, Plan)
        return check_swap(restore(
            cls, got, plan=plan, previous=plan, ended_at=lambda at: utc(parse_utc(at)), checks=lambda rows: tuple(Check(*row) for row in rows),
            phases=lambda rows: tuple((str(p), str(at), None if took is None else float(took)) for p, at, took in rows)))


def advance(s, phase, now, **facts):
    """(swap, phase, Unix time) -> the swap in that phase. The only code that changes a phase. Raises ValueError."""
    require(phase in TRANSITIONS[s.phase], f"{s.phase} cannot become {phase}")
    done = s.phases[:-1] + ((s.phases[-1][0], s.phases[-1][1], round(now - s.phase_began, 3)),) if s.phases else ()
    terminal = phase in TERMINAL
    phases = done + ((phase, utc(now), 0.0 if terminal else None),)
    return check_swap(dataclasses.replace(
        s, phase=phase, phases=phases, phase_began=now, seq=s.seq + 1, ended_at=utc(now) if terminal else None,
        eta_seconds=0.0 if phase == "ready" else s.eta_seconds if not terminal else None, slower=False,
        fraction=1.0 if phase == "ready" else 0.0, text="", **facts))


def estimate(s, durations, now):
    """(seconds left, usual seconds of this phase) from {phase: median seconds of earlier swaps}; None where unknown.

    In the running phase the larger of `usual minus elapsed` and what the fraction reached tells.
    """
    order = PHASES[:PHASES.index("ready")]
    if s.phase not in order:
        return None, None
    elapsed, usual = now - s.phase_began, durations.get(s.phase)
    left = max(0.0, usual - elapsed) if usual is not None else None
    if s.phase == "loading" and s.fraction > 0.1:
        by_fraction = elapsed * (1 - s.fraction) / s.fraction
        left = by_fraction if left is None else max(left, by_fraction * 0.5)
    later = [durations.get(p) for p in order[order.index(s.phase) + 1:] if p not in ("queued", "draining")]
    if left is None or s.phase not in ("loading", "warming") and any(d is None for d in later):
        return None, usual
    return round(left + sum(d or 0.0 for d in later), 1), usual


def reclaimed(samples, need_kb, floor_kb=2 << 20):
    """Whether memory is back: [(monotonic s, MemAvailable kB)] flat for a second, and covering need plus a floor."""
    if not samples or samples[-1][1] < need_kb + (floor_kb if need_kb else 0):
        return False
    last = [kb for at, kb in samples if at >= samples[-1][0] - 1.0]
    long_enough = samples[-1][0] - samples[0][0] >= 1.0
    return long_enough and max(last) - min(last) < 512 << 10


def memory_need_gb(model, total_gb, nodes):
    """(GiB that the engine will take on each Spark, GiB of them weights or 0, how that was found, the knob that decides it).

    vLLM takes gpu-memory-utilization (0.92 unless told) of all memory, or with kv-cache-memory-bytes the weights
    plus that (vllm/config/cache.py, v1/worker/utils.py); on a Spark the GPU and everything else share one memory.
    """
    knobs = {k.replace("_", "-"): v for k, v in model.knobs}
    weights = model.size_gb / nodes
    kv = knobs.get("kv-cache-memory-bytes")
    if kv is not None and (m := re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([kKmMgGtT]?)(i?[bB])?", str(kv), re.ASCII)):
        unit = {"": 1, "k": 1000, "m": 10**6, "g": 10**9, "t": 10**12, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": 1 << 40}[m[2]]
        return weights + float(m[1]) * unit / GIB + 4, weights, "weights, KV cache and 4 GB to work in", "kv-cache-memory-bytes"
    if gb := figure(str(knobs.get("gpu-memory-utilization-gb"))):       # of a patched vLLM: spark-vllm-docker, mods/gpu-mem-util-gb
        return gb, weights, f"{gb:g} GB", "gpu-memory-utilization-gb"
    knob = "device-memory-utilization" if "device-memory-utilization" in knobs else "gpu-memory-utilization"
    share = figure(str(knobs.get(knob, 0.92)))
    share = share if share and share <= 1 else 0.92         # what else it may be vLLM refuses
    return share * total_gb, weights, f"{share:g} of {total_gb:.1f} GB", knob


def webhook_payload(s):
    """What a webhook says of a swap that is over."""
    same = ("id", "slot", "model", "from_model", "error", "holder", "forced", "note", "rollback_of")
    return {**{name: getattr(s, name) for name in same}, "outcome": s.phase, "started": s.started_at, "finished": s.ended_at,
            "phases": [{"phase": p, "seconds": took} for p, _, took in s.phases]}


LEASE_MAX_S, END_LOCK = 86400, "or end its lock: DELETE /api/swap/lock?force=true"
SWAP_ENDS = {"ready": "complete", "failed": "failed", "cancelled": "cancelled"}        # outcome -> how its event is called: swap_…


@dataclasses.dataclass(frozen=True)
class Lease:
    """The right to swap, given to one holder for a time. Immutable.

    Its end counts on the clock of this boot, which nobody sets; expires_at is what people are shown, and what counts
    after a reboot. Until its holder was told the token it can end by itself:
        swap "asked"    granted, not answered   -> "" when answered, or the id of the swap it was taken for; ends if the
                                                   client goes or we crash; its time does not run yet
        swap ID         that swap is under way  -> ends if it fails (with its rollback) or the client went untold;
                                                   "" once it serves and the holder was told; its time does not run yet
        swap ""         the holder's own        -> ends by its token, by force, or in time
    """
    holder: str
    fence: int                  # grows with every new lease; with the holder it makes the token
    acquired_at: str
    ttl: float                  # seconds, from when its holder is told the token
    expires_at: float           # Unix time
    ends: float                 # boot_clock()
    boot: str                   # boot_id()
    note: str = ""
    client: str = ""
    swap: str = ""
    told: bool = True           # the holder has the token, or can ask for it again (Idempotency-Key)
    orphan: bool = False        # the holder went away untold

    def left(self):
        """Seconds until it ends; not positive: it is over."""
        return self.ttl if self.swap else self.ends - boot_clock()

    def facts(self, client=""):
        """What an event says of it."""
        return {"holder": self.holder, "fence": self.fence, "client": client}

    def replace(self, **facts):
        return dataclasses.replace(self, **facts)

    def extended(self, ttl, **facts):
        return self.replace(ttl=ttl, ends=boot_clock() + ttl, expires_at=time.time() + ttl, boot=boot_id(), **facts)

    def public(self, queue=0):
        """The shape of the API; a wall clock that was set since moves what is shown, not when it ends."""
        left, shown = max(0.0, self.left()), self.expires_at
        shown = shown if abs(time.time() + left - shown) < 2 else time.time() + left
        return {"locked": True, "holder": self.holder, "acquired_at": self.acquired_at, "expires_at": utc(shown),
                "expires_in": round(left, 1), "fence": self.fence, "note": self.note, "queue": queue}

    @classmethod
    def from_journal(cls, got):
        """The lease as it stands now. Raises TypeError, ValueError or AttributeError for another shape."""
        lease = restore(cls, got)
        require(max(lease.expires_at, lease.ends) < 1 << 33 and lease.ttl <= LEASE_MAX_S, "the lock ends too late")
        if lease.boot == boot_id() != "":
            return lease
        left = min(LEASE_MAX_S, lease.expires_at - time.time())     # after a reboot only the wall clock is left to go by
        return lease.replace(ends=boot_clock() + left, boot=boot_id())


def lease_after(lease, s, rolls_back):
    """What is left of a lease when swap s is over: one that was taken together with s ends with its failure."""
    if not lease or not lease.swap or lease.swap not in (s.id, s.rollback_of) or rolls_back:
        return lease
    if s.phase != "ready" or s.rollback_of or lease.orphan:
        return None
    return lease.extended(lease.ttl, swap="") if lease.told else lease


# What is kept of a request with an Idempotency-Key: when, a hash of what was asked, and the swap or, if the model was
# served already (swap ""), which; and the lease that came with it (fence 0: none).
ANSWER = {"at": (int, float), "print": str, "swap": str, "slot": str, "model": str, "fence": int, "holder": str}


@dataclasses.dataclass(frozen=True)
class Book:
    """All that decides who may start what, and all that swap.json holds. Immutable; replaced whole."""
    running: Swap | None = None
    waiting: Swap | None = None     # takes the place of the running rollback
    slots: dict = dataclasses.field(default_factory=dict)       # slot -> Plan of what we launched there
    lease: Lease | None = None
    fence: int = 0                  # of the last lease
    keys: dict = dataclasses.field(default_factory=dict)        # Idempotency-Key -> what it was answered

    def replace(self, **facts):
        return dataclasses.replace(self, **facts)

    def doc(self):
        return {"running": self.running and self.running.journal(), "waiting": self.waiting and self.waiting.journal(),
                "slots": {slot: dataclasses.asdict(plan) for slot, plan in self.slots.items()},
                "lease": self.lease and dataclasses.asdict(self.lease), "fence": self.fence, "keys": self.keys}

    @classmethod
    def from_doc(cls, got):
        """Raises TypeError, KeyError, ValueError or AttributeError for another shape."""
        require(not got or "slots" in got, "not a journal")
        running, waiting = (Swap.from_journal(got[k]) if got.get(k) else None for k in ("running", "waiting"))
        lease, keys, fence = Lease.from_journal(got["lease"]) if got.get("lease") else None, got.get("keys", {}), got.get("fence", 0)
        good = isinstance(fence, int) and all(isinstance(a[k], t) for a in keys.values() for k, t in ANSWER.items())
        require(good, "fence or keys are of another type")
        return cls(running, waiting, {slot: restore(Plan, p) for slot, p in got.get("slots", {}).items()}, lease,
                   max(fence, lease.fence if lease else 0), keys)


def recent_failures(recent, model, now, within=3600):
    """Swaps to model whose engine did not come up in the last hour, since it last did; newest first. For the breaker."""
    since_ready = itertools.takewhile(lambda s: s.phase != "ready", (s for s in recent if s.model == model and not s.dry_run))
    return [s for s in since_ready if s.phase == "failed" and parse_utc(s.ended_at) > now - within
            and {p for p, _, _ in s.phases} & {"launching", "loading", "warming"}]


def told_of(others):
    """Who holds how much, in words; "" for nobody."""
    return ", ".join(f"{who} ({gb:.1f} GB)" for who, gb in others.items() if gb >= 0.05)


def why_not(result):
    """One line that says why a Result did not reach its Spark."""
    last = result.err.strip().splitlines()[-1:] or [""]
    return f"{result.kind.replace('_', ' ')}: {printable(last[0], 200)}"


class Fit(NamedTuple):
    """A model's memory on one Spark, GiB: what it needs, and what can be there for it."""
    host: str
    total: float
    available: float
    back: float                 # what the old engine gives back
    need: float
    weights: float              # of the need; 0 = unknown
    how: str                    # the need was found
    knob: str                   # that decides it
    others: dict                # who else holds memory: GiB
    unknown: bool               # an engine runs there, and what it gives back is not known

    def verdict(self):
        """(status, detail, remedy, numbers)."""
        room = self.available + self.back
        said, has = f"{self.host}: needs {self.need:.1f} GB ({self.how})", f"{room:.1f} GB can be free" + (f", {self.back:.1f} of them given back by the old engine" if self.back else "")
        holders = told_of(self.others)
        share = self.knob.endswith("utilization")
        most, least = min(room - 6, self.total - 8), self.weights + 6       # what a knob should make of the need, to be `ok`

        def lower():
            if most < least:
                return (f"stop {holders}, or " if holders else "") + "take a smaller or more quantised model, or more Sparks"
            value = f"{math.floor(most / self.total * 100) / 100:.2f}" if share else \
                f"{math.floor(most)}" if self.knob.endswith("-gb") else f"{math.floor(most - self.weights - 4)}G"
            return f"lower {self.knob} to {value}" + (f", or stop {holders}" if holders else "")

        if self.weights + 1 > self.need:
            status, told = "fail", f"{self.host}: {self.weights:.1f} GB of weights and 1 GB to work in do not fit into {self.need:.1f} GB ({self.how})"
            remedy = f"raise {self.knob} to {math.ceil(least / self.total * 100) / 100:.2f}" if least <= most and share else \
                (f"stop {holders}, or " if holders else "") + "use more Sparks, or a smaller or more quantised model"
        elif self.need + 2 > room and self.unknown:
            status, told, remedy = "warn", f"{said}; {room:.1f} GB are free, and what the engine there gives back is not known", ""
        elif self.need + 2 > room:
            status, told, remedy = "fail", f"{said}, and {has}", lower()
        elif self.need + 6 > room:
            status, told, remedy = "warn", f"{said}, and {has}: that is tight beside vLLM's own processes", lower()
        elif self.total - self.need < 8:
            status, told, remedy = "warn", f"{said} and leaves {self.total - self.need:.1f} GB to the system: memory that runs out can freeze a Spark", lower()
        elif share and self.weights and self.weights + 4 > self.need:
            status, told = "warn", f"{said}, which leaves {self.need - self.weights:.1f} GB for KV cache and work beside {self.weights:.1f} GB of weights"
            remedy = f"raise {self.knob}, if one request does not fit"
        else:
            status, told, remedy = "ok", f"{said}, {has}", ""
        gb = {"total": self.total, "available": self.available, "given_back": self.back, "need": self.need, "weights": self.weights}
        rounded = lambda of: {k: round(v, 1) for k, v in of.items()}
        return status, told, remedy, {"host": self.host, **rounded(gb), "others": rounded(self.others)}


class Look:
    """What one look at every Spark of a slot found, before anything is touched; the checks below judge it."""

    def __init__(self, model, slot, config, facts, used, probe, current, others=()):
        self.model, self.slot, self.config = model, slot, config
        self.others = others            # Plans of what we launched in other slots
        self.used = used                # names of the Sparks that the swap needs
        self.probe = probe              # what the slot's port answered
        self.current = current          # the Plan that we launched there, or None
        self.down = {h: f for h, f in facts.items() if isinstance(f, Result)}       # Spark -> why it was not reached
        self.there = {h: f[0] for h, f in facts.items() if h not in self.down}      # Spark -> parse_facts
        self.seen = {h: f[1] for h, f in facts.items() if h not in self.down}       # Spark -> parse_spark
        self.head = self.there.get(slot.hosts[0])
        self.cluster = slot.backend == "launch-cluster"
        self.image = (model.image or LAUNCHER_IMAGE) if model and self.cluster else ""
        self.parsed = None              # what parse_verdict said, once it was asked
        self.deleting = False           # whether somebody deletes its weights

    def severity(self, host):
        """A Spark that this swap does not use may be in any state: a warning."""
        return "fail" if host in self.used else "warn"

    def weights_gb(self):
        """GiB of weights as found on disk, else as the catalog says; 0 = unknown."""
        for host in self.used:
            with contextlib.suppress(KeyError, IndexError, TypeError):
                return figure(self.there[host]["weights_kb"][0]) / (1 << 20)
        return self.model.size_gb

    def fits(self):
        """A Fit of each Spark that the swap needs and that tells its memory."""
        for host in self.used:
            with contextlib.suppress(KeyError, IndexError, ValueError):
                current, memory = self.current, self.seen[host]["memory"]
                total, available = memory["MemTotal"], memory["MemAvailable"]
                need, weights, how, knob = memory_need_gb(dataclasses.replace(self.model, size_gb=self.weights_gb()), total, len(self.used))
                told = ledger(self.seen[host], owners_of(self.config, host)) or {"engines": {}}
                back = told["engines"].get(self.slot.name)
                there = bool(back or self.probe.served or self.there[host]["engine"])
                ours = current.need_gb if there and current and host in current.hosts else 0.0
                unknown = there and back is None and not ours
                yield Fit(host, total, available, min(max(back or 0.0, ours), total - available), need, weights, how, knob,
                          holders(told, self.slot.name), unknown)

    def need_gb(self):
        return max((fit.need for fit in self.fits()), default=0.0)


def check_reachable(look):
    for host, result in look.down.items():
        yield look.severity(host), f"{host}: {why_not(result)}", remedy_for(result, look.config.sparks[host])
    if not look.down:
        yield "ok", f"{', '.join(look.there)} answered"


def check_launcher(look):
    if not look.cluster or look.head is None:
        return
    flags, directory, head = set(look.head["flag"]), look.config.settings["LAUNCH_DIR"], look.slot.hosts[0]
    old = [what for what, needle in LAUNCHER_NEEDS.items() if needle not in flags]
    elsewhere = next((v.strip("'\"") for v in look.head["env_container"] if v.strip("'\"") != look.slot.container), "")
    if look.head["launcher"] != ["yes"]:
        yield "fail", f"no executable launch-cluster.sh in {directory} on {head}", "clone spark-vllm-docker there, or set LAUNCH_DIR"
    elif old:
        yield "fail", f"this launch-cluster.sh does not know {' or '.join(old)}", f"update it: git -C {directory} pull"
    elif look.slot.container == "vllm_node" and elsewhere:      # the .env beats the default name, even when given
        yield "fail", f"CONTAINER_NAME in the launcher's .env makes it use {elsewhere}, not vllm_node", f"set VLLM_CONTAINER to {elsewhere}"
    else:
        yield "ok", f"launch-cluster.sh in {directory}, {len(flags)} options known"


def check_docker(look):
    bad = {h: seen["failed"].get("docker", ("does not answer", "")) for h, seen in look.seen.items() if look.cluster and seen["containers"] is None}
    for host, why in bad.items():
        yield look.severity(host), f"{host}: docker {': '.join(filter(None, why))}", "start docker, and add the ssh user to the group docker"
    if look.cluster and look.there and not bad:
        yield "ok", "answers"


def check_port(look):
    if look.head is None:
        return
    port, served = look.slot.port, look.probe.served
    who = ", ".join(served[:2]) or "something"
    known = look.current is not None and bool(set(served) & set(look.current.served_names))
    if not served and not look.head["listening"]:
        yield "ok", f"{port} is free"
    elif known or (look.head["engine"] if look.cluster else look.current):
        yield "ok", f"{port} is the engine that will be stopped ({who})"
    elif look.cluster or not served:
        yield ("fail", f"{who} answers on port {port} of {look.slot.hosts[0]}, and it is not in container {look.slot.container}",
               "stop it, or give the slot another port")
    else:
        yield "warn", f"{who} answers on port {port}; it was not started from here", "the template's stop must end it"


def check_rollback(look):
    """A previous model that is not ours is named beforehand."""
    served, current = look.probe.served, look.current
    there = bool(served) or look.head is not None and bool(look.head["engine"])
    if there and (current is None or served and served[0] not in current.served_names):
        yield "warn", f"{', '.join(served[:1]) or 'what runs there'} was not started from here and cannot be restored"


def check_neighbours(look):
    """Other slots on the Sparks of a cluster model must be empty: it needs the whole of each."""
    for plan in look.others if look.model and look.model.mode == "cluster" else ():
        if shared := sorted(set(plan.hosts) & set(look.used)):
            yield "fail", f"slot {plan.slot} serves {plan.model} on {', '.join(shared)}", f"unload {plan.slot} first"


def check_image(look):
    ids, image = {h: look.there[h]["image"] for h in look.used if h in look.there}, look.image
    if not look.cluster or not image:
        return
    lacking, have = [h for h, got in ids.items() if not got], {got[0] for got in ids.values() if got}
    if lacking:
        yield "fail", f"the image {image} is not on {', '.join(lacking)}", \
            f"docker pull {image}" if "/" in image else "build it there, or copy it from another Spark: ./build-and-copy.sh"
    elif len(have) > 1:
        yield "fail", f"{image} is another image on each of {', '.join(ids)}", "copy one to the others: ./build-and-copy.sh --copy-to"
    elif have:
        yield "ok", f"{image} is {have.pop()[:19]} on {', '.join(ids)}"


def check_roots(look):
    """A link may lead a local path to where nothing may be mounted from."""
    roots = look.config.settings["LOCAL_MODEL_ROOTS"]
    for host, facts in look.there.items() if look.model and look.model.local_path else ():
        for real in facts["real"]:
            if not any(real.startswith(root.rstrip("/") + "/") for root in roots):
                yield ("fail", f"{host}: {look.model.local_path} leads to {printable(real, 200)}, outside LOCAL_MODEL_ROOTS",
                       "move the model, or add that root")


def check_weights(look):
    if look.model is None:
        return
    good, source = [], look.model.source
    if look.deleting:
        yield "fail", f"{source} is being deleted", "wait for its end, and download it again"
    remedy = "check the path" if look.model.local_path else f"download it there: POST /api/models/{look.model.key}/download"
    for host in (h for h in look.used if h in look.there):
        facts = look.there[host]
        if not facts["weights"]:
            yield "fail", f"{source} is not on {host}", remedy
        elif facts["missing"]:
            missing = ", ".join([f for f in facts["missing"] if not f.endswith(".incomplete")][:3]) or "a file that is still being downloaded"
            yield "fail", f"{host} has {source} without {printable(missing, 200)}", "let the download finish, or download it again"
        else:
            good.append(host)
    if good:
        yield "ok", f"{look.weights_gb():.1f} GB on {', '.join(good)}"
    if look.model.repo and len(revisions := {os.path.basename(look.there[h]["weights"][0].rstrip("/")) for h in good}) > 1:
        yield "warn", f"the Sparks have different revisions of {source}: {', '.join(sorted(revisions))[:200]}", remedy


def check_disk(look):
    left = {h: gb for h in look.used if h in look.seen and (gb := look.seen[h]["room_gb"]) is not None}
    for host, gb in left.items():
        if gb < 10:
            yield "fail" if gb < 1 else "warn", f"{host} has {gb:.1f} GB of disk left; vLLM's caches and docker's logs need some", \
                "delete models that are not needed: GET /api/disk"
    if left and min(left.values()) >= 10:
        yield "ok", f"{min(left.values()):.0f} GB are free"


def check_memory(look):
    """What the engine will take, against what is available plus what the old engine gives back."""
    if look.model is None:
        return
    told = list(look.fits())
    yield from (fit.verdict() for fit in told)
    if not told:
        yield "warn", "the Spark does not tell how much memory it has"


def check_session(look):
    for host in (h for h in look.used if h in look.there and look.there[h]["removes_ipc"]):
        yield ("warn", f"{host}: when the ssh user's last session ends, systemd removes that user's shared memory (RemoveIPC), an engine's too",
               f"on {host}: sudo loginctl enable-linger $USER")


def check_clock(look):
    told = {h: [figure((f[name] or [""])[0]) for name in ("clock", "asked", "unsure")] for h, f in look.there.items() if h in look.used}
    clocks = {h: (clock - asked, unsure) for h, (clock, asked, unsure) in told.items() if None not in (clock, asked, unsure)}
    first, last = (pick(clocks, key=lambda h: clocks[h][0], default=None) for pick in (min, max))
    if first != last and (apart := clocks[last][0] - clocks[first][0]) > 2 + clocks[last][1] + clocks[first][1]:
        yield "warn", f"the clocks of {first} and {last} are {apart:.0f} s apart", "let both follow a time server: sudo timedatectl set-ntp true"


def check_driver(look):
    found = {h: look.seen[h]["gpu"]["driver"] for h in look.used if h in look.seen and look.seen[h]["gpu"]}
    if len(set(found.values())) > 1:
        yield "warn", f"the Sparks have different GPU drivers: {', '.join(f'{h} {v}' for h, v in found.items())}", "bring all of them up to date"


def check_flags(look):
    """vLLM's own word on the arguments; not asked (None) for a command template, or where another check failed first."""
    verdict, said = look.parsed or ("", "")
    if verdict == "rejected":
        yield "fail", f"vLLM refuses its arguments: {said}", "mend the model's knobs or args; this image's vLLM does not take them"
    elif verdict:
        yield ("ok", f"vLLM's own parser in {look.image} takes them") if verdict == "ok" else \
            ("warn", f"cannot tell whether vLLM in {look.image} takes the arguments: {said or 'no answer'}")


# One row per check, in the order they are told. The first two cannot be skipped: nothing would work, or nobody may say so.
CHECKS = {"reachable": check_reachable, "roots": check_roots, "launcher": check_launcher, "docker": check_docker, "port": check_port, "rollback": check_rollback,
          "neighbours": check_neighbours, "image": check_image, "weights": check_weights, "disk": check_disk, "memory": check_memory,
          "session": check_session, "clock": check_clock, "driver": check_driver, "flags": check_flags}


def evaluate_checks(look, skip=()):
    """Every check's verdict on a Look -> (Check, …). Pure. What fails and is named in skip is `skipped`."""
    found = [Check(name, *row) for name, check in CHECKS.items() for row in check(look)]
    return tuple(c._replace(status="skipped") if c.status == "fail" and c.name in skip else c for c in found)


# === 9 swap ===================================================================
# One thread, `swap`, performs the running swap phase by phase; every phase may be begun again after a crash. Others
# only ask: start(), cancel(). Decide under the lock, act outside it. The journal, swap.json, is written before the
# first effect of a phase. If it cannot be, nothing is stopped; later, a full disk does not stop a swap half-way.


class Failed(Exception):
    """The running swap cannot go on: what happened in an operator's words, and what to do."""

    def __init__(self, code, message, remedy=""):
        super().__init__(message)
        self.code, self.remedy = code, remedy


class Gate:
    """Counts requests in flight per slot, holds new ones while the slot swaps, and then lets them go one after the other."""

    def __init__(self):
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._held = set()                                  # guarded by _lock
        self._inflight = collections.Counter()              # guarded by _lock
        self._lines = collections.defaultdict(list)         # guarded by _lock; slot -> tickets of those who wait for a swap
        self._due = {}                                      # guarded by _lock; slot -> tickets whose turn comes, the first one first

    def hold(self, slot):
        with self._lock:
            self._held.add(slot)
            due = self._due.pop(slot, [])
            self._lines[slot][:0] = due
            for ticket in due:
                ticket.clear()

    def release(self, slot):
        with self._lock:
            self._held.discard(slot)
            self._due[slot] = self._due.get(slot, []) + self._lines.pop(slot, [])
            self._next_locked(slot)

    def _next_locked(self, slot):
        if due := self._due.get(slot):
            due[0].set()
        else:
            self._due.pop(slot, None)

    def is_held(self, slot):
        with self._lock:
            return slot in self._held

    def enter(self, slot, ticket=None):
        """Count one request in -> whether it may go: the slot is not held, and nobody's turn comes before."""
        with self._lock:
            due = self._due.get(slot)
            free = slot not in self._held and (not due or due[0] is ticket)
            if free:
                self._inflight[slot] += 1
            return free

    def queue(self, slot, later):
        """Stand in line -> a ticket, an Event that is set when its turn comes. later: wait for a swap's end in any case."""
        ticket = threading.Event()
        with self._lock:
            due = self._due.get(slot)
            (due if due and not later else self._lines[slot]).append(ticket)
            if not (due or later or slot in self._held):    # it was released a moment ago
                ticket.set()
        return ticket

    def step_out(self, slot, ticket):
        """The request of that ticket is on its way, or given up: it is the next one's turn."""
        with self._lock:
            for line in (self._lines[slot], self._due.get(slot, [])):
                if ticket in line:
                    line.remove(ticket)
            if slot not in self._held:
                self._next_locked(slot)

    def leave(self, slot):
        with self._lock:
            self._inflight[slot] -= 1
            if slot in self._held:
                self._wake.notify_all()

    def counts(self, slot):
        """(in flight, held)."""
        with self._lock:
            return self._inflight[slot], len(self._lines.get(slot, ())) + len(self._due.get(slot, ()))

    def drain(self, slot, timeout_s, cancel):
        """Wait until nothing is in flight -> how many still are. Raises Cancelled."""
        deadline = time.monotonic() + timeout_s
        with self._wake:
            while self._inflight[slot] and (left := deadline - time.monotonic()) > 0:
                if cancel.is_set():
                    raise Cancelled()
                self._wake.wait(min(left, 0.1))
            return self._inflight[slot]


class SwapLog:
    """The log of one swap: numbered lines in memory for streams, and on disk for good."""

    KEEP, DISK = 20_000, 8 << 20                            # lines in memory, bytes on disk

    def __init__(self, path):
        self.path = path
        self._lock = threading.Lock()
        self._lines = collections.deque(maxlen=self.KEEP)   # guarded by _lock; (n, at, text)
        self._room = self.DISK                              # guarded by _lock
        with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as f:
            for line in f:
                at, _, said = line.rstrip("\n").partition(" ")
                self._append_locked(at, said)

    def _append_locked(self, at, said):
        self._lines.append((self._lines[-1][0] + 1 if self._lines else 1, at, said))
        self._room -= len(said.encode()) + 26

    def add(self, said):
        """Append one line; a line from outside may hold anything."""
        at, said = utc(), printable(said)
        with self._lock:
            self._append_locked(at, said)
            if self._room > 0:
                with contextlib.suppress(OSError), open(self.path, "a", encoding="utf-8") as f:
                    f.write(f"{at} {said}\n")

    def after(self, n, limit=1000):
        """Lines whose number is greater than n, at most limit."""
        with self._lock:
            newest_first = list(itertools.takewhile(lambda line: line[0] > n, reversed(self._lines)))
        return newest_first[::-1][:limit]

    def tail(self, count=20):
        with self._lock:
            return [said for _, _, said in list(self._lines)[-count:]]


class Follower:
    """Reads an engine's log and heartbeat over one connection, and connects again when that is lost."""

    STAMP = re.compile(r"^(\d{4}-\d\d-\d\dT[\d:.]+Z) ?")

    def __init__(self, hosts, spark, plan, since):
        self.events = queue.Queue(5000)                     # ("log", text) ("dead", why) ("lost", why) ("back", ""); full: the Spark waits
        self._hosts, self._spark, self._plan, self._since = hosts, spark, plan, since
        self._seen_at = 0                                   # lines seen that carry the time stamp _since
        self._lost = False                                  # the connection was, and no beat came since
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="follow", daemon=True)
        self._thread.start()

    def close(self):
        self._closed.set()
        self._thread.join(5)

    def _put(self, *event):
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                return self.events.put(event, timeout=0.2)

    def _follow(self):
        pause = 0.25
        while not self._closed.is_set():
            try:
                why = self._read_once()
            except Exception as e:                          # this thread must not die silently
                log(f"follow: {type(e).__name__}: {e}")
                why = "internal error"
            if why is None:
                return
            if not self._lost:
                self._put("lost", why)
            pause = min(5.0, pause * 2) if self._lost else 0.25
            self._lost = True
            self._closed.wait(pause)

    def _read_once(self):
        """Why the connection ended; None when closed, or when the engine is dead."""
        self._resumed, self._skip, self._beat_at, self._dead = self._since, self._seen_at, time.monotonic(), False
        spark = self._hosts.sparks[self._spark]
        over = types.SimpleNamespace(is_set=lambda: self._dead or self._closed.is_set() or time.monotonic() - self._beat_at > 6)
        try:
            got = self._hosts.run_once(spark, follow_script(self._plan, self._since), math.inf, over, self._take)
            return "it ended" if got.kind == "ok" else why_not(got)
        except Cancelled:
            if self._dead or self._closed.is_set():
                return None
            if not spark.local:
                self._hosts.reset(spark)
            return "no sign of life for 6 s"

    def _take(self, pipe, line):
        """Whether a line is the engine's or the script's; else it is ssh's."""
        if pipe == "out":
            self._line(line, self._plan.backend == "launch-cluster")
        elif line == "beat":
            self._beat_at = time.monotonic()
            if self._lost:
                self._put("back", "")
            self._lost = False
        elif line.startswith("dead"):
            self._put("dead", line[5:].strip())
            self._dead = True
        return pipe == "out" or line == "beat" or self._dead

    def _line(self, line, stamped):
        if stamped and (m := self.STAMP.match(line)):
            if m[1] < self._resumed or m[1] == self._resumed and self._skip > 0:
                self._skip -= m[1] == self._resumed         # seen before the connection was lost
                return
            self._seen_at, self._since = (self._seen_at + 1 if m[1] == self._since else 1), m[1]
            line = line[m.end():]
        for part in filter(str.strip, line.split("\r")):
            self._put("log", part[:8000])


def places_of(slot, config, current, previous=None, plan=None):
    """What to stop, as Plans: where ours was launched, and the slot as it is configured now (None: not any more), if that was changed since."""
    known = [p for p in (previous, current, plan) if p and set(p.hosts) <= set(config.sparks)]
    if slot:
        alive = "" if slot.backend == "launch-cluster" else fill(
            config.layout.backends[slot.backend].alive, {"container": quote_arg(slot.container), "port": quote_arg(slot.port)})
        ours = current or previous          # of an engine that is not ours only the slot's size is known
        stop = stop_command(slot, config, len(slot.hosts) > 1 and (ours is None or len(ours.hosts) > 1))
        known.append(Plan(slot.name, "", (), slot.hosts, slot.port, slot.container, slot.backend, "", "", stop, "", alive))
    # of several at the same place the last one: the slot itself, which visits all of its Sparks
    return {(p.hosts[0], p.port, p.container, p.backend): p for p in known}.values()


def plan_of(look, checks):
    """(Plan of what a Look was taken for, or None; its checks, with one more if no command can be made of it)."""
    flags = frozenset(look.head and look.head["flag"] or ("--name",))
    try:
        return look.model and make_plan(look.model, look.slot, look.config, flags, look.need_gb(), look.weights_gb()), checks
    except ValueError as e:
        return None, (*checks, Check("command", "fail", str(e)))


def commands_of(places, plan):
    """What a swap runs, for people: `Spark: command`, ...."""
    found = [(p.hosts[0], p.stop) for p in places]
    found += [(plan.hosts[0], plan.shown), (plan.hosts[0], plan.logs.replace("\0", "now"))] if plan else []
    return tuple(f"{h}: {c}" for h, c in found if c)


class SwapRun:
    """The effects of one swap, one method per phase. Used by the swap thread only."""

    def __init__(self, manager, config, cancel):
        self.m, self.config, self.cancel = manager, config, cancel
        s = manager.book.running
        self.id, self.log, self.slot = s.id, manager.log_of(s.id), config.layout.slots.get(s.slot)
        plans = filter(None, (s.plan, s.previous, manager.book.slots.get(s.slot)))      # of models that may have changed since
        self.hidden = {*(config.models[s.model].secrets() if s.model in config.models else ()), *(value for plan in plans for value in plan.hidden)}
        self.phase, self.phase_at = "", 0.0     # the phase being performed, and since when (monotonic), by this process
        self.was_empty = False              # nothing was there to stop, so no memory has to come back
        self.down = set()                   # Sparks that did not answer when they were checked
        self.follower = None
        self.heard = Signal("none")         # the log's last word on progress
        self.cause = self.dead = None       # the fatal line nearest to the root; how the engine's process ended ("": not known)
        self.last_line = time.monotonic()
        self.cause_at = self.up_at = self.told_at = 0.0     # when: the first fatal line, the one that says it is up, progress told

    def close(self):
        if self.follower:
            self.follower.close()

    def perform(self, s):
        if self.slot is None:
            raise Failed("slot_gone", f"slot {s.slot} is not configured any more", "put it back into services-overrides.yaml")
        if s.phase != self.phase:
            self.phase, self.phase_at = s.phase, time.monotonic()
        getattr(self, "do_" + s.phase)(s)

    # --- helpers

    def on(self, host, script, timeout_s):
        return self.m.hosts.run(host, script, timeout_s, self.cancel)

    def endpoint(self, place):
        return endpoint_of(place, self.m.hosts, self.config.settings)

    def lives(self, plan):
        """Whether the engine's process lives, by the plan's own word; without one, whether its Spark answers."""
        return self.on(plan.hosts[0], alive_script(plan.alive), 10).kind == "ok"

    def left(self, limit):
        """Seconds that the phase still has. A restart in the middle gives it the whole again: the outage was not its fault."""
        return self.phase_at + self.config.settings[limit] - time.monotonic()

    def pause(self, seconds):
        if self.cancel.wait(seconds):
            raise Cancelled()

    # --- phases

    def do_queued(self, s):
        self.m._enter("checking")

    def do_checking(self, s):
        model = self.config.models.get(s.model)
        if s.model and not (model or s.rollback_of):
            raise Failed("unknown_model", f"{s.model} is not in the catalog any more")
        look, checks = self.m.examine(self.config, self.slot, model, ("flags",) if s.rollback_of else s.skip_checks, self.cancel)
        there = look.head and self.slot.container in [name for name, _ in (look.seen[self.slot.hosts[0]]["containers"] or {}).values()]
        self.down = set(look.down)
        self.was_empty = look.head is not None and not (look.probe.served or there or look.head["listening"])
        plan, checks = plan_of(look, checks) if not s.rollback_of else (s.plan, tuple(
            Check("reachable", "fail", f"{host}: {got.kind}", remedy_for(got, self.config.sparks[host]))
            for host, got in look.down.items() if host in s.plan.hosts))
        for c in checks:
            self.log.add(f"check {c.name}: {c.status}: {c.detail}")
        s = self.m._update(save=True, checks=checks, commands=commands_of(self.places(s), plan), plan=plan)
        bad = next((c for c in checks if c.status == "fail"), None)
        why = bad and f"check {bad.name}: {bad.detail}"
        if s.dry_run:
            return self.m._conclude("planned", error=bad and {"code": "check_failed", "message": why, "remedy": bad.remedy, "log_tail": []})
        if bad:
            raise Failed("check_failed", why, bad.remedy)
        self.m.gate.hold(s.slot)
        self.m._enter("draining")

    def do_draining(self, s):
        if left := self.m.gate.drain(s.slot, self.left("SWAP_DRAIN_SECONDS"), self.cancel):
            self.log.add(f"{left} requests did not end within SWAP_DRAIN_SECONDS and will be cut")
        previous = self.m.book.slots.get(s.slot) or s.previous
        answers = set(probe_vllm_endpoint(self.endpoint(self.slot), 2.0).served) if previous and not s.previous else set()
        if answers and answers.isdisjoint(previous.served_names):
            previous = None                 # somebody replaced what we launched; it is not ours to bring back
        self.m._enter("stopping", touched=True, previous=previous)

    def do_stopping(self, s):
        self.stop_engines(s, s.plan.hosts if s.plan else self.slot.hosts)
        if s.plan is None:
            return self.m._conclude("ready", plans={s.slot: None})
        self.wait_for_memory(s)
        self.m._enter("launching", forget=(s.slot,))

    def places(self, s):
        return places_of(self.slot, self.config, self.m.book.slots.get(s.slot), s.previous, s.plan)

    def stop_engines(self, s, needed):
        """Stop what runs in the slot and see that it is gone. Raises Failed if it is not; Sparks not needed may be down."""
        for place in self.places(s):
            self.stop_engine(place, needed)
        self.m._observe(s.slot, Probe("silent", detail="stopped"))

    def stop_engine(self, place, needed):
        deadline = time.monotonic() + self.config.settings["SWAP_STOP_TIMEOUT"]
        cluster, head, c = place.backend == "launch-cluster", place.hosts[0], quote_arg(place.container)

        def run(hosts, script, most=1e9):       # what is said is logged and kept, not read
            got = self.m.hosts.each(hosts, lambda host: self.on(host, script, max(1.0, min(most, deadline - time.monotonic()))))
            return {host: r._replace(out=hide(r.out, self.hidden), err=hide(r.err, self.hidden)) for host, r in got.items()}
        hosts = [host for host in place.hosts if host in needed or host not in self.down]
        for host in set(place.hosts) - set(hosts):
            self.log.add(f"warning: {host} did not answer, so nothing is stopped there")
        if cluster:
            # the last lines of the engine's log die with its container, so they are kept
            got = run([head], f"docker inspect {c} >/dev/null 2>&1 && docker logs -t --tail 5000 {c} 2>&1 | tail -c 4000000", 10)[head]
            if got.kind == "ok" and got.out.strip():
                with contextlib.suppress(OSError):
                    write_atomic(os.path.join(self.m.dir, self.id + ".engine.log"), got.out.encode())
            run(hosts, retire_script(place.container), 20)
            # half of the time at most: what the launcher leaves is removed below all the same
            got = run([head], place.stop, self.config.settings["SWAP_STOP_TIMEOUT"] / 2)[head]
            if got.kind != "ok":
                self.log.add(f"launch-cluster.sh stop: {got.kind}: {got.err.strip()[-300:] or got.out.strip()[-300:]}")
        for host, got in run(hosts, remove_script(place.container) if cluster else place.stop).items():
            why = f"the container {place.container} is still there" if got.code == 4 else got.kind.replace("_", " ")
            what = f"{host}: {why} {got.err.strip()[-200:]}"
            if got.kind == "failed" and not cluster:    # `docker rm -f` of nothing, say: whether it is gone is seen below
                self.log.add(f"{host}: the template's stop ended with {got.code}: {got.err.strip()[-300:]}")
            elif got.kind != "ok" and host in needed:
                raise Failed("stop_failed", f"the old engine could not be stopped: {printable(what)}",
                             remedy_for(got, self.config.sparks[host]) or "stop it by hand on that Spark")
            elif got.kind != "ok":
                self.log.add(f"warning: {what}")
        # until nothing answers on the port and, with a template, no engine process is left
        while (probe := probe_vllm_endpoint(self.endpoint(place), 1.0)).state != "silent" or place.alive and self.lives(place):
            if time.monotonic() >= deadline:
                what = f"port {place.port} still answers ({', '.join(probe.served[:2]) or probe.detail})"
                raise Failed("stop_failed", what if probe.state != "silent" else "the old engine's process still lives",
                             "stop it by hand on the Spark")
            self.pause(0.1)

    def wait_for_memory(self, s):
        """The reclaim gate: launch only when every Spark used has the memory back and it has settled."""
        samples, silent = {host: [] for host in s.plan.hosts}, {}
        need_kb = 0 if "memory" in s.skip_checks or s.rollback_of else int(s.plan.need_gb * (1 << 20))
        deadline = time.monotonic() + self.config.settings["SWAP_STOP_TIMEOUT"]
        script = "awk '/^MemAvailable:/ {print \"available\", $2}' /proc/meminfo 2>/dev/null; exit 0"
        while True:
            for host, got in self.m.hosts.each(samples, lambda h: self.on(h, script, 10)).items():
                silent[host] = not got.reached
                if m := re.search(r"^available (\d{1,15})$", got.out, re.M | re.ASCII):        # a login shell may say more
                    samples[host].append((time.monotonic(), int(m[1])))
                elif got.reached:
                    del samples[host]       # not a Linux: nothing to go by
            host = next((h for h, v in samples.items()
                         if silent[h] or not (reclaimed(v, need_kb) or self.was_empty and v[-1][1] >= need_kb)), None)
            if host is None:
                return
            has = f"{samples[host][-1][1] / (1 << 20):.1f} GB available" if samples[host] else "not answered"
            if time.monotonic() >= deadline:
                who = told_of(holders(ledger(parse_spark(self.on(host, spark_script(), 15).out), owners_of(self.config, host))))
                raise Failed("unreachable" if silent[host] else "memory_not_released",
                             f"{host} has {has} after the stop, and the model needs {s.plan.need_gb:.1f} GB" + (f"; memory is held by {who}" if who else ""),
                             f"stop {who or 'what else holds memory there'}, or lower gpu-memory-utilization")
            self.m._update(text=f"Waiting for memory: {host} has {has}")
            self.pause(0.25)

    def do_launching(self, s):
        head, limit = s.plan.hosts[0], self.config.settings["SWAP_LAUNCH_TIMEOUT"]
        script, left = launch_once_script(s.id, s.plan.launch), functools.partial(self.left, "SWAP_LAUNCH_TIMEOUT")
        while not (got := self.on(head, script, max(1.0, left()))).reached and left() > 0:
            self.log.add(f"{head}: {got.kind.replace('_', ' ')}; trying again")     # the script's own gate makes that safe
            self.pause(0.5)
        lines = [line for line in f"{got.out}\n{got.err}".splitlines() if line.strip()]
        # the first line that begins so is ours, whatever a login shell says before it and the launcher after it
        since = next((line[6:].strip() for line in lines if line.startswith("since ")), "")
        lines = [hide(line, self.hidden) for line in lines if line != "since " + since]
        for line in lines:
            self.log.add(line)
        if got.kind == "time_out" and got.code != 255:      # 255: it was ssh that got no answer
            raise Failed("launch_timeout", f"the launcher did not end within {limit:g} s (SWAP_LAUNCH_TIMEOUT)",
                         "run its command by hand and see where it hangs")
        if not got.reached:
            raise Failed("unreachable", f"{head}: {why_not(got)}", remedy_for(got, self.config.sparks[head]))
        cause = min((c for c in map(classify_log_line, lines) if c.kind == "fatal"), key=lambda c: c.rank, default=None)
        if cause:                           # the launcher ends with 0 whatever docker said
            raise Failed(cause.code, f"launch failed: {cause.text}", cause.remedy)
        if got.kind != "ok":
            raise Failed("launch_failed", f"the launcher ended with exit code {got.code}: {printable((lines or [''])[-1], 300)}",
                         "run the launch command by hand (it is in the swap's commands)")
        self.m._enter("loading", since=since)

    def do_loading(self, s):
        """Until the engine itself answers for this model; see _watch for what ends it early."""
        settings, port = self.config.settings, s.plan.port
        while True:
            self._watch(s, 0.1)
            probe = probe_vllm_endpoint(self.endpoint(self.slot), 1.0)
            if {s.model, *s.plan.served_names} & set(probe.served):
                return self.m._enter("warming")
            if probe.served:
                raise Failed("port_taken", f"port {port} answers for {probe.served[0]}, which is not this model",
                             "stop what listens there, or give the slot another port")
            if self.up_at and time.monotonic() - self.up_at > settings["SWAP_ANSWER_TIMEOUT"]:
                raise Failed("not_answering", f"the engine says it is up, and port {port} does not answer from here ({probe.detail})",
                             "is a firewall between, or does a knob bind the engine to another address or port?")
            if self.left("SWAP_LOAD_TIMEOUT") <= 0:
                raise Failed("load_timeout", f"not ready after {settings['SWAP_LOAD_TIMEOUT']:g} s (SWAP_LOAD_TIMEOUT)",
                             "see the log for what it does; a larger limit, or a faster load-format")

    def _watch(self, s, timeout_s):
        """Take what the follower saw, turn it into progress; raises Failed as soon as the engine is known to fail."""
        self.follower = self.follower or Follower(self.m.hosts, s.plan.hosts[0], s.plan, s.since)
        until = time.monotonic() + timeout_s
        while time.monotonic() < until + 1:                 # a flood of lines must not keep us from probing
            self.pause(0)
            try:
                kind, value = self.follower.events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            if kind == "log":
                self._heard(value)
            elif kind == "dead":
                self.dead = value
            else:
                self.log.add(f"-- contact with {s.plan.hosts[0]} {'lost: ' + value + '; trying again' if kind == 'lost' else 'is back'}")
        now = time.monotonic()
        if self.dead is not None or self.cause and now - self.cause_at > 0.7:
            raise self._why_dead()
        self._tell_progress(now)

    def _heard(self, line):
        self.last_line, line = time.monotonic(), hide(line, self.hidden)
        self.log.add(line)
        heard = classify_log_line(line)
        if heard.kind == "progress":
            self.heard = heard
            if heard.fraction == 0.99:
                self.up_at = self.up_at or self.last_line
        elif heard.kind == "fatal":
            self.cause_at = self.cause_at or self.last_line
            self.cause = min(self.cause or heard, heard, key=lambda signal_: signal_.rank)

    def _tell_progress(self, now):
        """Publish progress when it changed, and the time left once a second."""
        s = self.m.book.running
        fraction, text_ = max(s.fraction, self.heard.fraction), self.heard.text or "Starting vLLM"
        if now - self.told_at < 1 and (fraction, text_) == (s.fraction, s.text):
            return
        durations = self.m.durations(s.model, s.plan.weights_gb)
        eta, usual = estimate(dataclasses.replace(s, fraction=fraction), durations, time.time())
        slower = bool(usual) and time.time() - s.phase_began > 1.5 * usual and now - self.last_line > 30
        changed = {"fraction": fraction, "text": text_, "eta_seconds": eta, "usual_seconds": usual, "slower": slower}
        self.told_at = now
        if any(getattr(s, k) != v for k, v in changed.items()):
            self.m._update(**changed)

    def _why_dead(self):
        if self.cause and (self.cause.code != "engine_failed" or not self.dead):
            return Failed(self.cause.code, self.cause.text, self.cause.remedy)
        told = f" with exit code {self.dead}" if self.dead else ""
        return Failed(*{
            "gone": ("container_gone", "the engine's container vanished while it was loading",
                     "did somebody stop it, or did docker restart?"),
            "137": ("out_of_memory", "the engine was killed (exit 137), most likely because memory ran out",
                    "lower gpu-memory-utilization, or free memory on the Spark"),
        }.get(self.dead, ("engine_died", f"the engine's process ended{told} while it was loading", "the log's last lines may say why")))

    def do_warming(self, s):
        """One tiny request, so that `ready` means: answers a prompt. The engine's death ends it early, as a cancel does."""
        done, stop = queue.SimpleQueue(), threading.Event()

        def ask():
            try:
                done.put(do_work(self.endpoint(self.slot), "", ENGINE_WORK({"model": s.model}), self.config.settings["SWAP_WARM_TIMEOUT"], stop))
            except Exception as e:                          # told below, by the thread that decides
                done.put(("the engine", 0, why_silent(e)[1].encode(), False))
        threading.Thread(target=ask, name="warm", daemon=True).start()
        try:
            while done.empty():
                self._watch(s, 0.02)
            path, status, reply, good = done.get()
        finally:
            stop.set()
        if not good:
            self.log.add(f"{path} answered {status}: {reply[:300].decode('utf-8', 'replace')}")
            what = f"{path}: HTTP {status}{' without a result' * (status < 300)}" if status else reply.decode()
            raise Failed("warming_failed", f"the engine is up, and its first request failed ({what})",
                         "the log's last lines may say why")
        self.m._observe(s.slot, Probe("serving", s.plan.served_names))
        self.m._conclude("ready", plans={s.slot: s.plan})

    def clean_up(self, s):
        """Leave no half-started engine -> the Plan of what is in the slot all the same, or None; says so in the log."""
        self.cancel = threading.Event()     # from here on nothing ends the swap early
        gave_up = (s.ending.get("error") or {}).get("code") == "stop_failed"    # else its end may still be under way
        if gave_up and s.previous and set(probe_vllm_endpoint(self.endpoint(self.slot), 1.0).served) & set(s.previous.served_names) \
                and self.lives(s.previous):
            return s.previous               # it would not stop, and serves still
        try:
            if s.plan:
                self.on(s.plan.hosts[0], end_launch_script(s.id), 10)
            self.stop_engines(s, s.plan.hosts if s.plan else ())
            return None
        except Exception as e:              # whatever it is, the swap has to come to its end
            self.log.add(f"-- clean-up failed: {e}")
            if not isinstance(e, Failed):
                log(f"swap {s.id}: clean-up: {traceback.format_exc()}")
            return s.plan if s.phase in ("launching", "loading", "warming") else None       # the new one, which could not be reached


class Answered(Exception):
    """This Idempotency-Key was answered before."""


def busy_with(s):
    """The refusal of who comes while a swap runs."""
    said = f"a swap to {s.model or 'nothing'} is running on {s.slot} ({s.phase}): wait for its end (GET /api/swap/{s.id}?wait=600), or cancel it"
    return Refused(409, "swap_running", said, retry_after(s.eta_seconds or 10),
                   swap=s.id, model=s.model, phase=s.phase, eta_seconds=s.eta_seconds)


class Arbiter:
    """Who may act: the lease and the queue for it, Idempotency-Keys, and the journal that they share with the swap.

    Whoever changes the Book holds _lock from the decision until it is on disk and published: what is told was
    written, and right and busyness are one read. Reading takes one snapshot, book, and no lock.
    """

    QUEUE, KEYS, KEY_S = 100, 1000, 86400                   # waiters; Idempotency-Keys and how long they count

    def __init__(self, data_dir, hub, events, warn):
        self._path = os.path.join(data_dir, "swap.json")
        self._hub, self._events = hub, events               # events(kind, text, **facts)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self.book = Book()                                  # replaced under _lock
        self._queue = ()                                    # replaced under _lock; tickets, the first one first
        self._passing = 0                                   # replaced under _lock; fence of the last lease that holding() took
        self._closing = threading.Event()
        self._secret, known = self._read_secret(os.path.join(data_dir, "lock.secret"), warn)
        try:
            self.book = Book.from_doc(read_state(self._path, warn))
        except (TypeError, KeyError, ValueError, AttributeError) as e:
            warn(f"swap.json is of another shape ({printable(str(e), 200)}); the lock is free, and what the slots really serve counts")
            with contextlib.suppress(OSError):
                os.replace(self._path, f"{self._path}.bad-{int(time.time())}")
        if known and not self.book.fence:                   # lost with the journal: higher than any before
            self.book = self.book.replace(fence=int(time.time()))
        elif not known and self.book.lease:
            warn(f"lock.secret was lost, and with it the lock of {self.book.lease.holder}")
            self.book = self.book.replace(lease=None)

    @staticmethod
    def _read_secret(path, warn):
        """(the 32 bytes that tokens are made with, whether they are from an earlier start); mode 0600."""
        with contextlib.suppress(OSError), open(path, "rb") as f:
            if len(got := f.read(100)) == 32:
                return got, True
            warn("lock.secret was damaged and is made anew")
        got = secrets.token_bytes(32)
        try:
            write_atomic(path, got)
        except OSError as e:
            warn(f"lock.secret cannot be written ({e.strerror}): tokens will be void after a restart")
        return got, False

    @contextlib.contextmanager
    def _changing(self):
        """Hold _lock for one decision; what is put into the list given is told as events afterwards, and long-polls wake."""
        before, news = (self.book, self._queue), []
        try:
            with self._wake:
                yield news
        finally:
            for kind, said, facts in news:
                self._events(kind, said, **facts)
            if news or self.book is not before[0] or self._queue is not before[1]:
                self._hub.bump()

    def _commit_locked(self, book, must=True):
        """Write the journal, then publish book. Raises Refused 503 and changes nothing if it must be written and cannot."""
        write_state(self._path, book.doc(), "journal_unwritable" if must else None)
        self.book = book
        self._wake.notify_all()

    # --- the lease

    def token(self, lease):
        """What proves that one holds it; derived, so that it is stored nowhere and can be told again."""
        return hmac.new(self._secret, f"{lease.fence}:{lease.holder}".encode(), "sha256").hexdigest()

    def _is_token(self, lease, token):
        return hmac.compare_digest(self.token(lease).encode(), token.encode("utf-8", "replace"))

    def lock_info(self):
        """What everybody may know of the lease."""
        lease = self.book.lease
        return lease.public(len(self._queue)) if lease and lease.left() > 0 else {"locked": False}

    def _settle_locked(self, news):
        """End a lease whose time is over and give a free one to the first in the queue -> the Book."""
        lease = self.book.lease
        if lease and lease.left() <= 0:
            return self._end_locked(news, "lock_expired", f"the lock of {lease.holder} expired")
        if not lease and self._queue:
            first, *rest = self._queue
            self._queue = tuple(rest)
            self._grant_locked(first, news, must=False)
        return self.book

    def _end_locked(self, news, kind, said, client="", must=False):
        lease = self.book.lease
        self._commit_locked(self.book.replace(lease=None), must)
        news.append((kind, said, lease.facts(client)))
        return self._settle_locked(news)

    def _grant_locked(self, ticket, news, must=True):
        fence = self.book.fence + 1
        lease = Lease(ticket.holder, fence, utc(), 0.0, 0.0, 0.0, "", ticket.note, ticket.client, ticket.swap, ticket.told).extended(ticket.ttl)
        self._commit_locked(self.book.replace(lease=lease, fence=fence), must)
        ticket.lease, ticket.new = lease, True
        said = f"{ticket.holder} holds the lock for {ticket.ttl:g} s" + (f": {ticket.note}" if ticket.note else "")
        news.append(("lock_acquired", said, lease.facts(ticket.client)))

    def acquire(self, holder, ttl, token="", queue_up=False, note="", client="", swap="", told=True):
        """Take the lease, extend one's own, or stand in the queue for it. Raises Refused 409, 422, 429, 503.

        Returns a ticket, whose lease is set at once, or later by whoever serves the queue.
        """
        with self._changing() as news:
            lease = self._settle_locked(news).lease
            ticket = types.SimpleNamespace(holder=holder, ttl=ttl, note=note, client=client, swap=swap, told=told, lease=None, new=False)
            if token and not (lease and self._is_token(lease, token)):      # silence would hide that the lock was not exclusive
                raise Refused(409, "lock_lost", "the lock of this token is over: see what serves now, and take the lock again without the token", **(lease.public() if lease else {}))
            if lease and token:
                if holder and lease.holder != holder:
                    raise Refused(422, "bad_field", f"holder must be {lease.holder}, whose token was sent, or be left out", field="holder")
                ticket.lease = lease.extended(ttl)
                self._commit_locked(self.book.replace(lease=ticket.lease))
                news.append(("lock_extended", f"{lease.holder} holds the lock for {ttl:g} s more", lease.facts(client)))
            elif not lease:
                self._grant_locked(ticket, news)
            elif not queue_up:
                raise self.held_locked(409, "lock_held", f"stand in its queue with `wait` (seconds), {END_LOCK}")
            elif len(self._queue) >= self.QUEUE:
                raise Refused(429, "queue_full", f"{self.QUEUE} others wait for the lock: try again in a minute", {"Retry-After": "60"})
            else:
                self._queue += (ticket,)
        return ticket

    def held_locked(self, status, code, remedy):
        """The refusal that says who holds the lock, until when, what runs, and what to do."""
        lease, running = self.book.lease, self.book.running
        doing = {"swap": running.id, "phase": running.phase, "swap_eta_seconds": running.eta_seconds} if running else {}
        told = lease.public(len(self._queue))
        del told["locked"]
        return Refused(status, code, f"{lease.holder} holds the lock until {told['expires_at']}" + (f" ({lease.note})" if lease.note else "") + "; " + remedy,
                       retry_after(lease.left()), **told, eta_seconds=told["expires_in"], **doing)

    def leave(self, ticket, drop=False):
        """Step out of the queue; tells the refusal for a wait that ended, or None if the lease was given. drop: not wanted any more."""
        with self._changing() as news:
            lease = self._settle_locked(news).lease
            if ticket in self._queue:
                self._queue = tuple(t for t in self._queue if t is not ticket)
                return self.held_locked(409, "lock_held", f"it was not given back while you waited: wait longer, {END_LOCK}")
            if drop and ticket.new and lease and lease.fence == ticket.lease.fence:
                self._end_locked(news, "lock_released", f"the lock of {lease.holder} ended: its holder went away")

    def release(self, token="", force=False, client=""):
        """Give the lease back -> whether there was one. Raises Refused 403 without its token or force, 503."""
        with self._changing() as news:
            lease = self._settle_locked(news).lease
            if lease and self._is_token(lease, token):
                self._end_locked(news, "lock_released", f"{lease.holder} gave the lock back", client, must=True)
            elif lease and force:
                self._end_locked(news, "lock_override", f"{client or 'someone'} ended the lock of {lease.holder} by force", client, must=True)
            elif lease:
                raise Refused(403, "lock_token_wrong", f"only the token of {lease.holder} ends its lock: send it as X-Swap-Lock-Token, or overrule with ?force=true",
                              holder=lease.holder, expires_at=lease.public()["expires_at"])
        return lease is not None

    def end_lease(self, fence, why):
        """End the lease with this fence, if it is still there."""
        with self._changing() as news:
            lease = self._settle_locked(news).lease
            if lease and lease.fence == fence:
                self._end_locked(news, "lock_released", f"the lock of {lease.holder} ended: {why}")

    def answered(self, fence, gone=False):
        """The holder of a lease taken together with a swap is told its token, or (gone) cannot be any more -> Lease or None."""
        with self._changing() as news:
            book = self._settle_locked(news)
            lease = book.lease
            if not lease or lease.fence != fence:
                return None
            begun = lease.swap in {i for s in (book.running, book.waiting) if s for i in (s.id, s.rollback_of)} - {None}
            if not gone:
                lease = lease.replace(told=True) if begun or not lease.swap else lease.extended(lease.ttl, told=True, swap="")
            elif begun and not lease.told:
                lease = lease.replace(orphan=True)
            elif lease.swap == "asked" or not lease.told:
                self._end_locked(news, "lock_released", f"the lock of {lease.holder} ended: its holder went away")
                return None
            if lease != book.lease:
                self._commit_locked(book.replace(lease=lease), must=False)
            return lease

    def right_locked(self, token, force):
        """(the lease that the caller acts under or None, the lease that it overrides or None). Raises Refused 423, 409."""
        lease = self.book.lease
        if force or (self._is_token(lease, token) if lease else not token):
            return (None, lease) if lease and not self._is_token(lease, token) else (lease, None)
        if not lease:                           # as a fence: whoever thinks that it holds the lock must learn that it does not
            raise Refused(409, "lock_lost", "the lock of this token is over: see what serves now, and take the lock again")
        raise self.held_locked(423, "swap_locked", "take the lock after it (POST /api/swap/lock with `wait`), or overrule it with ?force=true")

    @contextlib.contextmanager
    def holding(self, token, force, what, client, ttl=150):
        """The right to do what is no swap, for ttl seconds at most, and meanwhile the lock: the caller's, its own, or with force anybody's. Raises Refused 423, 409."""
        ours = types.SimpleNamespace(holder=what, ttl=ttl, note="", client=client, swap="", told=True, lease=None)
        with self._changing() as news:
            self._settle_locked(news)
            (lease, overridden), running = self.right_locked(token, force), self.book.running
            if running and not force:
                raise busy_with(running)
            if overridden:
                news.append(("lock_override", f"{client} overrode the lock of {overridden.holder} for {what}", overridden.facts(client)))
            elif lease is None and ttl:
                self._grant_locked(ours, news)
                self._passing = ours.lease.fence
            elif lease and lease.left() < ttl:
                self._commit_locked(self.book.replace(lease=lease.extended(ttl).replace(ttl=lease.ttl)))
        try:
            yield
        finally:
            if ours.lease:
                self.end_lease(ours.lease.fence, "its work is done")

    # --- Idempotency-Keys

    def answer_to(self, key):
        """What the request with this key, (key, hash of what is asked), was answered, or None. Raises Refused 422."""
        found = self.book.keys.get(key[0]) if key else None
        if not found or found["at"] < time.time() - self.KEY_S:
            return None
        if found["print"] != key[1]:
            raise Refused(422, "idempotency_mismatch", "this Idempotency-Key was used for another request: take a new one")
        return found

    def _keyed(self, book, key, swap, slot, model, lease):
        """book with the answer to key kept in it."""
        if not key:
            return book
        since = time.time() - self.KEY_S
        kept = {k: a for k, a in list(book.keys.items())[-self.KEYS:] if a["at"] > since}
        kept[key[0]] = {"at": time.time(), "print": key[1], "swap": swap, "slot": slot, "model": model or "",
                        "fence": lease.fence if lease and lease.swap else 0, "holder": lease.holder if lease and lease.swap else ""}
        return book.replace(keys=kept)

    def remember(self, key, slot, model, token, force):
        """Keep what a request is answered that found its model served already. Raises Answered, and Refused if its token is void."""
        with self._changing() as news:
            book = self._settle_locked(news)
            if self.answer_to(key):
                raise Answered()
            lease = self.right_locked(token, force)[0] if token else None
            if key:
                self._commit_locked(self._keyed(book, key, "", slot, model, lease))

    def _expire(self):
        """What the thread `lease` does again and again: end a lease on time."""
        with self._wake:                        # a wait stops in suspend, so not for too long
            lease = self.book.lease
            self._wake.wait(None if lease is None else min(30.0, max(0.0, lease.left()) + 0.005))
        with self._changing() as news:
            self._settle_locked(news)


class SwapManager(Arbiter):
    """Decides who may swap, keeps the history, and owns the thread that acts."""

    KEEP, KEEP_DRY = 50, 10                                 # terminal swaps, each with its log; dry runs, in memory only

    def __init__(self, data_dir, config, hosts, hub, gate, events, warn, observe=lambda slot, probe: None):
        self.dir = os.path.join(data_dir, "swaps")
        self._config, self.hosts, self.gate, self._observe = config, hosts, gate, observe       # config: () -> Config
        self.recent = ()                                   # replaced under _lock; terminal swaps, newest first
        self._logs = {}                                     # guarded by _lock; id -> SwapLog
        self._verdicts = {}                                 # guarded by _lock; (image id, argv) -> what vLLM's parser said
        self._cancel = threading.Event()                    # set for the running swap only
        self._validating = threading.BoundedSemaphore(1)
        self.deleting = lambda repo: False                  # set once, before begin(): whether somebody deletes its weights
        os.makedirs(self.dir, mode=0o700, exist_ok=True)
        super().__init__(data_dir, hub, events, warn)
        self._load(warn)
        self._threads = [forever("swap", self._closing, self._work), forever("lease", self._closing, self._expire)]

    # --- reading

    def get(self, swap_id):
        """The Swap with that id. Raises Refused 404."""
        book = self.book                        # first: a swap that ends is in `recent` before it leaves the book
        for s in (book.running, book.waiting, *self.recent):
            if s and s.id == swap_id:
                return s
        raise Refused(404, "unknown_swap", f"there is no swap {printable(swap_id, 80)}; GET /api/swap lists the last {self.KEEP}")

    def mark(self, slot):
        """(id of the swap that has touched the slot or None, the last one that ended): equal marks mean nothing happened."""
        s = self.book.running
        return (s.id if s and s.slot == slot and s.holds else None), self.recent[:1]

    def log_of(self, swap_id):
        with self._lock:
            kept = self._logs.get(swap_id)
        return kept or SwapLog(os.path.join(self.dir, self.get(swap_id).id + ".log"))

    def durations(self, model, weights_gb=0):
        """{phase: median seconds of this model's successful swaps}; loading of a new one is scaled by the size of its weights."""
        times, rates = collections.defaultdict(list), []
        for s in self.recent:
            if s.phase == "ready" and s.model:
                for phase, _, seconds in s.phases:
                    if s.model == model:
                        times[phase].append(seconds)
                    elif phase == "loading" and s.plan and s.plan.weights_gb:
                        rates.append(seconds / s.plan.weights_gb)
        got = {phase: statistics.median(values) for phase, values in times.items()}
        if "loading" not in got and rates and weights_gb:
            got["loading"] = statistics.median(rates) * weights_gb
        return got

    # --- looking

    def examine(self, config, slot, model, skip=(), cancel=None, thorough=False):
        """One look at every Spark of the slot and at its port -> (Look, its checks).

        vLLM's parser, which takes seconds, is asked only if nothing else speaks against the swap, or if thorough.
        """
        used = slot.hosts if model is None or model.mode == "cluster" else slot.hosts[:1]

        def gather(host):
            if (got := self.hosts.run(host, "exit 0", 5, cancel)).kind != "ok":     # all of it may take longer, but not to begin
                return got
            began = time.time()
            got = self.hosts.run(host, facts_script(model if host in used else None, slot, config, host == slot.hosts[0]), 25, cancel)
            (facts, seen), half = parse_facts(got.out), (time.time() - began) / 2
            facts |= {"asked": [f"{began + half:.3f}"], "unsure": [f"{half:.3f}"]}
            return (facts, seen) if got.kind == "ok" else got
        others = [p for name in config.layout.slots if name != slot.name and (p := self.book.slots.get(name))]
        look = Look(model, slot, config, self.hosts.each(slot.hosts, gather), used,
                    probe_vllm_endpoint(endpoint_of(slot, self.hosts, config.settings), 2.0), self.book.slots.get(slot.name), others)
        look.deleting = bool(model and self.deleting(model.repo))
        checks = evaluate_checks(look, skip)
        if look.image and "flags" not in skip and (thorough or not any(c.status == "fail" for c in checks)):
            look.parsed = self._parse(look, cancel)
            checks = evaluate_checks(look, skip)
        return look, checks

    def _parse(self, look, cancel):
        """What vLLM's parser says to the arguments; remembered for this image and these arguments. None: no image to ask."""
        argv = ("serve", look.model.source, *engine_args(look.model, look.slot))
        if not (key := look.head and look.head["image"] and (look.head["image"][0], argv)):
            return None
        with self._lock:
            known = self._verdicts.get(key)
        if known:
            return known
        got = self.hosts.run(look.slot.hosts[0], parser_script(look.image, argv), 60, cancel)
        verdict, said = parse_verdict(got)
        verdict = verdict, hide(said, look.model.secrets())
        if got.kind == "ok":                    # else docker did not get to run it: next time it may
            with self._lock:
                self._verdicts = dict([*self._verdicts.items(), (key, verdict)][-200:])
        return verdict

    def validate(self, slot, model):
        """What a swap of slot to model would check and run, vLLM's parser always included; nothing is touched -> JSON. Raises Refused 409."""
        config = self._config()
        if not self._validating.acquire(blocking=False):        # the parser takes 600 MB of a Spark's memory
            raise Refused(409, "validate_running", "another validation is under way: ask again when it is over", {"Retry-After": "10"})
        try:
            plan, checks = plan_of(*self.examine(config, slot, model, thorough=True))
        finally:
            self._validating.release()
        return {"model": model.key, "slot": slot.name, "ok": not any(c.status == "fail" for c in checks), "checks": [c._asdict() for c in checks],
                "commands": commands_of(places_of(slot, config, self.book.slots.get(slot.name)), plan)}

    # --- asking

    def start(self, slot, model, token="", force=False, key=None, **options):
        """Begin a swap of slot to model (a key; None = unload) -> the queued Swap.

        Right, breaker and busyness are judged in one read, and the journal is written before the swap is published: a
        refusal changes nothing. A dry run, and a rollback of the same slot, give way to a new swap, which waits as
        `queued` until they have cleaned up. Raises Refused 423 without the lock's token, 409, 503, and Answered.
        """
        now = time.time()
        swap = Swap(f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(now))}-{secrets.token_hex(4)}", slot, model, started_at=utc(now), forced=force,
                    phase_began=now, phases=(("queued", utc(now), None),), from_model=getattr(self.book.slots.get(slot), "model", None), **options)
        if model is None or swap.dry_run:
            swap = dataclasses.replace(swap, rollback=False)
        check_swap(swap)
        with self._changing() as news:
            book = self._settle_locked(news)
            if self.answer_to(key):
                raise Answered()
            lease, overridden = (None, None) if swap.dry_run else self.right_locked(token, force)
            running = book.running
            gives_way = running and (running.dry_run or running.rollback_of and running.slot == slot)
            if running and (not gives_way or book.waiting or swap.dry_run):
                raise busy_with(book.waiting or running)
            if not swap.dry_run:
                self._judge(swap, now)
            if lease:
                swap = dataclasses.replace(swap, holder=lease.holder, fence=lease.fence)
                lease = lease.replace(swap=swap.id) if lease.swap == "asked" else lease.extended(lease.ttl, swap="", told=True) if lease.swap else lease
            book = self._keyed(book.replace(lease=lease or book.lease), None if swap.dry_run else key, swap.id, slot, model, lease)
            self._commit_locked(book.replace(**{"waiting" if running else "running": swap}))
            self._logs[swap.id] = SwapLog(os.path.join(self.dir, swap.id + ".log"))
            (self._cancel.set if running else self._cancel.clear)()
            facts = {"swap": swap.id, "slot": slot, "model": model, "holder": swap.holder, "client": swap.client}
            wish = "to unload" if model is None else f"what a swap to {model} would do on" if swap.dry_run else f"for {model} on"
            news.append(("dry_run" if swap.dry_run else "swap_started", f"{swap.holder or swap.client or 'someone'} asked {wish} {slot}", facts))
            if overridden:
                said = f"{swap.client or 'someone'} overrode the lock of {overridden.holder}"
                news.append(("lock_override", said, facts | {"overridden": overridden.holder}))
        return swap

    def _judge(self, swap, now):
        """Refuse with 409 what failed too often, unless forced, and an automatic swap too soon after the last one."""
        failed = recent_failures(self.recent, swap.model, now) if swap.model and not swap.forced else ()
        if len(failed) >= 3:
            told = [{"swap": s.id, "ended_at": s.ended_at, **{k: s.error.get(k) for k in ("code", "message", "remedy")}} for s in failed]
            wait = max(1.0, parse_utc(failed[2].ended_at) + 3600 - now)
            raise Refused(409, "model_failing", f"{swap.model} failed to load {len(failed)} times in an hour: {failed[0].error['message']}; "
                          "mend it, or try once more with ?force=true", retry_after(wait), failures=told)
        last = next((s for s in self.recent if s.slot == swap.slot and s.phase == "ready" and s.model and not s.dry_run), None)
        least = self._config().settings["MIN_SERVING_SECONDS"]
        if swap.automatic and last and self.book.slots.get(swap.slot) and 0 <= now - parse_utc(last.ended_at) < least:
            wait = parse_utc(last.ended_at) + least - now
            raise Refused(409, "serving_too_short", f"{last.model} serves for less than {least:g} s (MIN_SERVING_SECONDS); only a person or a "
                          "lock's holder may replace it yet: ask again then", retry_after(wait), eta_seconds=round(wait, 1))

    def cancel(self, swap_id, token="", force=False, client=""):
        """Tell a swap to end; it cleans up first, and one that waits its turn ends at its beginning -> the Swap as it is now.

        Raises Refused 404, 409, 423.
        """
        with self._changing() as news:
            book = self._settle_locked(news)
            s = self.get(swap_id)
            place = next((k for k in ("running", "waiting") if getattr(book, k) is s), None)
            if place is None:
                raise Refused(409, "swap_over", f"the swap is {s.phase} already: there is nothing to cancel, and POST /api/swap begins another",
                              phase=s.phase)
            overridden = self.right_locked(token, force)[1] if s.fence and book.lease and s.fence == book.lease.fence else None
            if not s.cancelling:
                s = dataclasses.replace(s, cancelling=True, seq=s.seq + 1)
            self._commit_locked(book.replace(**{place: s}), must=False)
            if place == "running":
                self._cancel.set()
            news.append(("lock_override" if overridden else "swap_cancel", f"{client or 'someone'} cancelled the swap to {s.model or 'nothing'}"
                         + (f" of {overridden.holder} by force" if overridden else ""), {"swap": s.id, "client": client, "holder": s.holder}))
        return s

    # --- journal

    def _load(self, warn):
        """What the journal does not hold: the history. Then what its lease has come to meanwhile."""
        book, recent = self.book, []
        live, keyed = {s.id for s in (book.running, book.waiting) if s}, {a["swap"] for a in book.keys.values()}
        found = sorted(n[:-5] for n in os.listdir(self.dir) if n.endswith(".json"))
        kept, old = set(live), {name for name in found[:-2 * self.KEEP] if name not in keyed}
        for name in (name for name in found if name not in old):
            try:
                recent.append(Swap.from_journal(read_state(os.path.join(self.dir, name + ".json"), warn)))
                kept.add(recent[-1].id)
            except (OSError, TypeError, KeyError, ValueError, AttributeError) as e:
                warn(f"swaps/{name}.json {'cannot be read' if isinstance(e, OSError) else 'is of another shape'} and is left out")
        for name in os.listdir(self.dir):                   # what a crash or a dry run left
            if name.startswith(".tmp-") or name.endswith(".log") and name.split(".")[0] not in kept or name.split(".")[0] in old:
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.dir, name))
        recent.sort(key=lambda s: s.ended_at or "", reverse=True)
        over = {s.id: s for s in recent if s.id not in live}
        if book.lease and book.lease.swap:
            back = book.running and book.running.rollback_of
            if book.lease.swap not in live | {back}:        # "asked", whose client is gone, or a swap that is over
                s, lease = over.get(book.lease.swap), book.lease
                book = book.replace(lease=s and lease.told and lease_after(lease, s, False) or None)
                if not book.lease:
                    self._events("lock_released", f"the lock of {lease.holder} ended while sparkctl was away: nobody was told", **lease.facts())
            elif not book.lease.told:
                book = book.replace(lease=book.lease.replace(orphan=True))
        with self._lock:
            self.book, self.recent = book, self._kept_of(over.values(), keyed)[0]
            for s in filter(None, (book.running, book.waiting)):
                self._logs[s.id] = SwapLog(os.path.join(self.dir, s.id + ".log"))
        if book.running and (book.running.cancelling or book.waiting):
            self._cancel.set()
        if book.running and book.running.holds:
            self.gate.hold(book.running.slot)

    def _kept_of(self, swaps, keyed):
        """(swaps to keep, swaps to forget): the last ones, and those that an Idempotency-Key names."""
        real, dry = [s for s in swaps if not s.dry_run], [s for s in swaps if s.dry_run]
        old = [s for s in real[self.KEEP:] if s.id not in keyed] + dry[self.KEEP_DRY:]
        return tuple(s for s in swaps if s not in old), old

    def _update(self, save=False, **facts):
        """Replace fields of the running swap; only the swap thread calls this."""
        with self._lock:
            s = dataclasses.replace(self.book.running, seq=self.book.running.seq + 1, **facts)
            book = self.book.replace(running=s)
            if save:
                self._commit_locked(book, must=False)
            self.book = book
        self._hub.bump()
        return s

    def _enter(self, phase, forget=(), **facts):
        """Make a transition, journal it, tell everybody. forget: slots in which nothing of ours is left."""
        with self._lock:
            s = advance(self.book.running, phase, time.time(), **facts)
            slots = {slot: plan for slot, plan in self.book.slots.items() if slot not in forget}
            try:                                            # from the stop on a restart must know what was going on
                self._commit_locked(self.book.replace(running=s, slots=slots), must=phase == "stopping")
            except Refused as e:
                raise Failed("journal_unwritable", str(e), "free space on sparkctl's disk") from None
        self._hub.bump()
        self.log_of(s.id).add(f"-- {phase}")
        return s

    # --- acting

    def begin(self):
        """Start the threads; a swap found in the journal is resumed."""
        if s := self.book.running:
            self.log_of(s.id).add(f"-- sparkctl was started again while {s.phase}; going on")
        for thread in self._threads:
            thread.start()

    def close(self):
        """Stop acting without touching any engine; the journal lets the next start go on."""
        self.end_lease(self._passing, "sparkctl was told to end")
        self._closing.set()
        with self._lock:
            self._wake.notify_all()
        self._cancel.set()                                  # wakes every wait; _drive asks _closing first
        for thread in filter(threading.Thread.is_alive, self._threads):
            thread.join(2)

    def _work(self):
        """What the thread `swap` does again and again."""
        with self._lock:
            self._wake.wait_for(lambda: self.book.running or self._closing.is_set())
        if not self._closing.is_set():
            self._drive()

    def _drive(self):
        """Perform the running swap to its end."""
        run = SwapRun(self, self._config(), self._cancel)
        try:
            while not self._closing.is_set() and (s := self.book.running) and s.id == run.id:
                try:
                    if s.ending:
                        self._finish(run)
                    elif self._cancel.is_set():
                        raise Cancelled()
                    else:
                        run.perform(s)
                    continue
                except Cancelled:
                    ending = {"phase": "cancelled"}
                except Failed as e:
                    ending = {"phase": "failed", "error": {"code": e.code, "message": str(e), "remedy": e.remedy,
                                                           "log_tail": run.log.tail(20)}}
                except Exception as e:
                    log(f"swap {s.id}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
                    ending = {"phase": "failed", "error": {"code": "internal", "message": "an internal error; sparkctl's own log has it",
                                                           "remedy": "report it with that log", "log_tail": []}}
                if self._closing.is_set():      # not the swap's end but ours; the next start goes on
                    return
                if (now := self.book.running) is None or now.id != run.id:
                    return                      # it was over when this happened
                self._update(save=True, ending=ending)
        finally:
            run.close()

    def _finish(self, run):
        """Clean up after a failed or cancelled swap, close it, and begin the rollback if one is due."""
        s = self.book.running
        run.close()
        left = run.clean_up(s) if s.touched else None
        if self._closing.is_set():              # it may have been cut off; the next start does it again
            return
        serves = left is not None and left == s.previous
        if serves:
            run.log.add(f"-- {left.model} still serves")
        elif s.touched and s.rollback and not s.previous:
            run.log.add("-- nothing to roll back to: what served before was not started from here")
        # a swap that took a rollback's place and touched nothing owes that rollback still
        self._conclude(s.ending["phase"], plans={s.slot: left} if s.touched else None,
                       rollback=s.previous is not None and not serves and (s.rollback or not s.touched),
                       error=s.ending.get("error"), ending=None)

    def _conclude(self, phase, plans=None, rollback=False, **facts):
        """The terminal transition: the swap joins the history, and what waits, or its rollback, is the running one.

        Whoever sees the swap over can start the next at once. The history is written first: a crash in between
        finds the swap in the journal and ends it again.
        """
        now, swap_log = time.time(), self.log_of(self.book.running.id)
        swap_log.add(f"-- {phase}" + (f": {facts['error']['message']}" if facts.get("error") else ""))
        with self._changing() as news:
            book = self._settle_locked(news)
            rollback = rollback and book.waiting is None
            s = advance(book.running, phase, now, rollback_id=book.running.id + "-rb" if rollback else None, cancelling=False, **facts)
            if not s.dry_run:
                write_state(os.path.join(self.dir, s.id + ".json"), s.journal())
            following = book.waiting
            if following and s.rollback_of and phase != "ready":        # it gave way: what it would have brought back is still owed
                following = dataclasses.replace(following, previous=s.plan)
            elif rollback:
                following = Swap(s.rollback_id, s.slot, s.previous.model, started_at=utc(now), phase_began=now,
                                 phases=(("queued", utc(now), None),), rollback=False, rollback_of=s.id,
                                 plan=s.previous, holder=s.holder, fence=s.fence, note=s.note, client=s.client)
                self._logs[following.id] = SwapLog(os.path.join(self.dir, following.id + ".log"))
            lease = lease_after(book.lease, s, rollback)
            if lease is None and book.lease:
                news.append(("lock_released", f"the lock of {book.lease.holder} ended with its swap", book.lease.facts()))
            slots = {**book.slots, **(plans or {})}
            self.recent, old = self._kept_of((s, *self.recent), {a["swap"] for a in book.keys.values()})
            (self._cancel.set if following and following.cancelling else self._cancel.clear)()
            self._commit_locked(book.replace(running=following, waiting=None, lease=lease, slots={k: v for k, v in slots.items() if v}), must=False)
            self._settle_locked(news)
            self._logs.pop(s.id, None)
            if not s.dry_run:
                news.append((f"swap_{SWAP_ENDS[phase]}", f"{s.model or 'unload'} on {s.slot}: {phase}" + (f", {s.error['message']}" if s.error else ""), {
                    "swap": s.id, "slot": s.slot, "model": s.model, "rollback_of": s.rollback_of, "holder": s.holder, "payload": webhook_payload(s)}))
        if not (following and following.slot == s.slot and (rollback or following.rollback_of or following.previous)):
            self.gate.release(s.slot)
        for o in old:
            for suffix in (".json", ".log", ".engine.log"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.dir, o.id + suffix))

    def keep_box(self, swap_id, spark, told):
        """Add what a Spark told last to a swap, whether it runs or is over."""
        add = lambda s: dataclasses.replace(s, blackbox={**(s.blackbox or {}), spark: told}, seq=s.seq + 1)
        with self._lock:
            if self.book.running and self.book.running.id == swap_id:
                self._commit_locked(self.book.replace(running=add(self.book.running)), must=False)
            for s in (s for s in self.recent if s.id == swap_id):
                kept = add(s)
                write_state(os.path.join(self.dir, s.id + ".json"), kept.journal())
                self.recent = tuple(kept if old is s else old for old in self.recent)       # what is told is on the disk
        self._hub.bump()


# === 10 coordination ==========================================================
# How others are told, and when what is due: events (the audit log), webhooks, schedules of others (shown, never
# run), jobs of our own (through the same lock and swap as anyone else). Cron expressions count in local time.

# Every kind of event: what WEBHOOK_EVENTS can name, and counters have from the start.
EVENTS = tuple("""swap_started swap_cancel swap_complete swap_failed swap_cancelled dry_run lock_acquired lock_extended lock_released lock_expired
    lock_override model_changed model_lost engine_wedged engine_recovered job_set job_removed job_ok job_failed schedule_set schedule_removed
    download_started download_complete download_failed download_cancelled weights_deleted service_serving service_loading service_down
    service_unreachable service_unknown service_restart spark_ok spark_unreachable spark_unknown catalog_changed settings_changed config_changed started stopped
    state_lost""".split())


class Events:
    """What happened, newest last: in memory for readers, appended to events.jsonl (1 MiB, one older file kept)."""

    KEEP, ROTATE = 500, 1 << 20
    SHAPE = {"n": int, "at": str, "kind": str, "text": str}

    def __init__(self, path, hub):
        self._path, self._hub = path, hub
        self.listeners = []                                 # f(event, payload), set before the threads start
        self._lock = threading.Lock()
        self._list = collections.deque(maxlen=self.KEEP)    # guarded by _lock
        for name in (path + ".1", path):
            with contextlib.suppress(OSError), open(name, encoding="utf-8", errors="replace") as f:
                for line in f:
                    with contextlib.suppress(ValueError, RecursionError):       # a torn last line
                        got = json.loads(line)
                        if isinstance(got, dict) and all(isinstance(got.get(k), t) for k, t in self.SHAPE.items()):
                            self._list.append({**got, "text": printable(got["text"], 500)})
        self._n = max((e["n"] for e in self._list), default=0)     # guarded by _lock
        with contextlib.suppress(OSError), open(path, "rb+") as f:
            f.seek(-1, os.SEEK_END)
            if f.read(1) != b"\n":                          # torn in a crash: the next event begins a line of its own
                f.write(b"\n")

    def add(self, kind, text_, payload=None, **facts):
        """Record what happened; facts: who and what. payload: what a webhook says of it, if more than that."""
        with self._lock:
            self._n += 1
            known = {k: v for k, v in facts.items() if v not in (None, "")}
            event = {"n": self._n, "at": utc(), "kind": kind, "text": printable(text_, 500), **known}
            self._list.append(event)
            with contextlib.suppress(OSError):
                if os.path.exists(self._path) and os.path.getsize(self._path) > self.ROTATE:
                    os.replace(self._path, self._path + ".1")
                with open(self._path, "a", encoding="utf-8") as f:
                    f.write(json.dumps(event) + "\n")
        log(f"event {kind}: {text_}")
        for listener in self.listeners:
            try:
                listener(event, payload)
            except Exception as e:                          # no more threads, say: whoever tells has done its work
                log(f"event {kind} could not be passed on: {type(e).__name__}: {e}")
        self._hub.bump()

    def since(self, n, limit=500):
        """Newest first."""
        with self._lock:
            return [e for e in reversed(self._list) if e["n"] > n][:limit]


class Webhooks:
    """Tells other programs by POST. One thread and one bounded queue a receiver, so that a dead one delays nobody."""

    KEEP, QUEUE, LIMIT_S, IDLE_S = 50, 100, 5.0, 60.0

    def __init__(self, settings, hub):
        self._settings, self._hub = settings, hub           # settings: () -> Settings
        self._lock = threading.Lock()
        self._deliveries = collections.deque(maxlen=self.KEEP)      # guarded by _lock; newest first
        self._queues = {}                                   # guarded by _lock; URL -> Queue of its thread
        self._outcomes = collections.Counter()              # guarded by _lock; outcome -> deliveries since the start

    def wants(self, kind):
        wanted = any(fnmatch.fnmatchcase(kind, name) for name in self._settings()["WEBHOOK_EVENTS"])
        return kind == "test" or wanted and kind != "dry_run"

    def tell(self, event, payload=None):
        """Queue one event for every receiver that wants it -> ids of the deliveries. Never blocks."""
        return [self._queue(url, event, payload) for url in self._settings()["WEBHOOK_URL"]] if self.wants(event["kind"]) else []

    def _queue(self, url, event, payload):
        facts = payload or {k: v for k, v in event.items() if k not in ("n", "kind")}
        body = to_json({"event": event["kind"], "at": event["at"], **facts})
        place = urllib.parse.urlsplit(url)                  # the rest of a URL may be its secret
        row = {"id": secrets.token_hex(8), "event": event["kind"], "to": f"{place.scheme}://{place.netloc.rpartition('@')[2]}",
               "queued_at": utc(), "outcome": "queued", "status": None, "seconds": None, "detail": ""}
        with self._lock:
            self._deliveries.appendleft(row)
            if url not in self._queues:
                waiting = queue.Queue(self.QUEUE)
                threading.Thread(target=self._work, args=(url, waiting), name="webhook", daemon=True).start()
                self._queues[url] = waiting
            try:
                self._queues[url].put_nowait((row, body))
            except queue.Full:
                row.update(outcome="dropped", detail=f"{self.QUEUE} deliveries were waiting already")
                self._outcomes["dropped"] += 1
        return row["id"]

    def deliveries(self):
        with self._lock:
            return [dict(row) for row in self._deliveries]

    def outcomes(self):
        with self._lock:
            return dict(self._outcomes)

    def _work(self, url, waiting):
        while True:
            try:
                row, body = waiting.get(timeout=self.IDLE_S)
            except queue.Empty:
                with self._lock:
                    if not waiting.empty():
                        continue
                    return self._queues.pop(url)            # its URL may have been changed: nobody comes back for this thread
            began = time.monotonic()
            try:
                status = self._post(url, row, body)
                outcome = {"outcome": "delivered" if 200 <= status < 300 else "refused", "status": status,
                           "detail": "" if 200 <= status < 300 else f"it answered {status}" + "; redirects are not followed" * (300 <= status < 400)}
            except Exception as e:                          # whatever a receiver does; this thread must not die of it
                what = getattr(e, "reason", None) or getattr(e, "strerror", None) or type(e).__name__
                late = time.monotonic() - began >= self.LIMIT_S
                outcome = {"outcome": "failed", "detail": f"no answer within {self.LIMIT_S:g} s" if late else printable(str(what), 200)}
            with self._lock:
                row.update(outcome, seconds=round(time.monotonic() - began, 3))
                self._outcomes[outcome["outcome"]] += 1
            if outcome["outcome"] != "delivered":
                log(f"webhook {row['event']} to {row['to']}: {outcome['outcome']} {outcome.get('status') or ''} {outcome['detail']}")
            self._hub.bump()

    def _post(self, url, row, body):
        """One POST -> status; LIMIT_S to connect, LIMIT_S for the rest. TLS is verified; no redirect is followed, no proxy used."""
        place, secret = urllib.parse.urlsplit(url), self._settings()["WEBHOOK_SECRET"]
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=self.LIMIT_S) if place.scheme == "http" else \
            http.client.HTTPSConnection(place.hostname, place.port, timeout=self.LIMIT_S, context=ssl.create_default_context())
        headers = {"Content-Type": "application/json", "User-Agent": f"sparkctl/{VERSION}",
                   "X-Spark-Event": row["event"], "X-Spark-Delivery": row["id"]}
        if secret:
            headers["X-Spark-Signature"] = "sha256=" + hmac.new(secret.encode(), body, "sha256").hexdigest()
        if place.username:
            login = f"{urllib.parse.unquote(place.username)}:{urllib.parse.unquote(place.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        connection.connect()
        sock = connection.sock

        def cut():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        alarm = threading.Timer(self.LIMIT_S, cut)          # http.client limits each read, not all of them together
        alarm.start()
        try:
            connection.request("POST", (place.path or "/") + (f"?{place.query}" if place.query else ""), body, headers)
            return connection.getresponse().status
        finally:
            alarm.cancel()
            connection.close()


MONTHS = {name: n for n, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), 1)}
DAYS = {name: n for n, name in enumerate("sun mon tue wed thu fri sat".split())}
CRON_FIELDS = (("minute", 0, 59, {}), ("hour", 0, 23, {}), ("day of the month", 1, 31, {}), ("month", 1, 12, MONTHS),
               ("day of the week", 0, 7, DAYS))
CRON_WORDS = {"@hourly": "0 * * * *", "@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@weekly": "0 0 * * 0",
              "@monthly": "0 0 1 * *", "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *"}


class Cron(NamedTuple):
    """A parsed cron expression."""
    minutes: tuple
    hours: tuple
    days: frozenset
    months: frozenset
    weekdays: frozenset         # 0 = Sunday
    either: bool                # both day fields are restricted: one of them has to match
    fixed: bool                 # a time of day, rather than `every so often`


@functools.lru_cache(1000)
def parse_cron(expression):
    """The five fields of crontab(5), or @daily and its like -> Cron. Raises ValueError."""
    fields = CRON_WORDS.get(expression.strip().lower(), expression).split()
    require(len(fields) == 5, f"must be five fields, or one of {', '.join(CRON_WORDS)}")
    sets = []
    for field, (what, low, high, words) in zip(fields, CRON_FIELDS):
        found = set()
        for part in field.lower().split(","):
            m = re.fullmatch(r"(?:(\*)|(\w+)(?:-(\w+))?)(?:/(\d{1,4}))?", part, re.ASCII)
            ends = [words.get(end, int(end) if end.isdigit() else -1) for end in (m[2], m[3] or m[2])] if m and m[2] else [low, high]
            step = int(m[4]) if m and m[4] else 1
            require(m and low <= ends[0] <= ends[1] <= high and step and not (m[4] and m[2] and not m[3]),
                    f"{part[:40]!r} is not a {what} ({low}-{high}, lists, ranges, * and steps such as */5)")
            found |= set(range(ends[0], ends[1] + 1, step))
        sets.append(found)
    minute, hour, day, _, weekday = (field.startswith("*") for field in fields)
    return Cron(tuple(sorted(sets[0])), tuple(sorted(sets[1])), frozenset(sets[2]), frozenset(sets[3]), frozenset(d % 7 for d in sets[4]),
                not day and not weekday, not minute and not hour)


def moments(cron, day):
    """The Unix times of a cron expression on a local date, in order.

    A time of day that the clocks skip in spring comes as soon as they have jumped, one that comes twice in autumn
    counts once; what runs `every so often` follows the real time (as cron(8) of Debian does).
    """
    midnights = [int(datetime(d.year, d.month, d.day).timestamp()) for d in (day, day + timedelta(days=1))]
    times, out = [(hour, minute) for hour in cron.hours for minute in cron.minutes], set()
    if midnights[1] - midnights[0] == 86400:    # nobody sets the clocks on this day
        return [midnights[0] + 3600 * hour + 60 * minute for hour, minute in times]
    for hour, minute in times:
        wall = datetime(day.year, day.month, day.day, hour, minute)
        first, second = (int(wall.replace(fold=fold).timestamp()) for fold in (0, 1))
        if datetime.fromtimestamp(first) == wall:
            out |= {first} if cron.fixed else {first, second}
        elif cron.fixed:                        # skipped: they jump somewhere after `second`, at `first` at the latest
            before = time.localtime(second).tm_gmtoff
            out.add(next(at for at in range(second, first + 60, 60) if time.localtime(at).tm_gmtoff != before))
    return sorted(out)


def runs_between(cron, after, until):
    """The Unix times of a cron expression later than `after` and not later than `until`, one by one."""
    day, last = datetime.fromtimestamp(after).date(), datetime.fromtimestamp(until).date()
    while day <= last:
        dates, weekdays = day.day in cron.days, day.isoweekday() % 7 in cron.weekdays
        if day.month in cron.months and (dates or weekdays if cron.either else dates and weekdays):
            yield from (at for at in moments(cron, day) if after < at <= until)
        day += timedelta(days=1)


def next_run(cron, after):
    """The first Unix time of a cron expression later than `after`; None if there is none in eight years (29 February)."""
    return next(runs_between(cron, after, after + 8 * 366 * 86400), None)


def find_conflicts(wishes, most=50):
    """[(id, slot, model, from, to)] -> [{at, ids, models, text}]: pairs that want different models in a slot at a time, each once."""
    told, active, out = set(), {}, []           # active: id -> the wish that lasts
    for wish in sorted(wishes, key=lambda w: w[3]):
        name, slot, model, start, _ = wish
        active = {n: w for n, w in active.items() if w[4] > start}
        for other in (w for w in active.values() if w[1] == slot and w[2] != model and frozenset((w[0], name)) not in told):
            told.add(frozenset((other[0], name)))
            at = time.strftime("%H:%M", time.localtime(start))
            out.append({"at": utc(start), "ids": [other[0], name], "models": [other[2], model],
                        "text": f"two jobs want different models at {at}: {other[0]} {other[2]}, {name} {model}"})
        active[name] = max(wish, active.get(name, wish), key=lambda w: w[4])
        if len(out) >= most:
            break
    return out


class Register:
    """Entries by id, kept in a JSON file; one that is bad there is left out and reported."""

    MOST = 200

    def __init__(self, path, what, fields, required, hub, warn):
        self._path, self._what, self._hub = path, what, hub
        self._lock = threading.Lock()
        self.entries = {}                                   # replaced under _lock; id -> entry
        got = read_state(path, warn) or {"entries": {}}
        if not isinstance(got.get("entries"), dict):
            warn(f"{os.path.basename(path)} is of another shape and is left out")
            got = {"entries": {}}
        for key, entry in list(got["entries"].items())[:self.MOST]:
            try:
                entry = checked(expect("mapping", entry), fields, "it")
                require(entry.get("id") == key and set(required) <= set(entry), "a field is missing")
                self.entries[key] = entry
            except (ValueError, TypeError, Refused) as e:
                warn(f"{os.path.basename(path)}: {printable(str(key), 80)} is left out: {e}")

    def change(self, key, change, must=True):
        """Replace an entry by change(entry or None); None drops it -> the new one. Raises Refused 404, 409, 503."""
        with self._lock:
            entry = change(self.entries.get(key))
            if entry is None:
                entry_of(self.entries, self._what, key)     # Refused, if there is none to drop
            entries = {k: v for k, v in self.entries.items() if k != key} | ({key: entry} if entry is not None else {})
            if len(entries) > self.MOST:
                raise Refused(409, "too_many", f"at most {self.MOST} are kept: delete one first")
            write_state(self._path, {"entries": entries}, "state_unwritable" if must else None)
            self.entries = entries
        self._hub.bump()
        return entry


def moment(value):
    """An RFC 3339 time with its zone, as text."""
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"2[01]\d\d-\d\d-\d\d[T ][\d:.]{5,15}(Z|[+-]\d\d:\d\d)", expect("text", value), re.ASCII) and parse_utc(value):
            return value
    raise ValueError("must be a time such as 2026-01-31T06:00:00+01:00")


def cron_text(value):
    require(isinstance(value, str) and len(value) <= 500, "must be a cron expression of at most 500 characters")
    require(next_run(parse_cron(value), time.time()), "never comes")
    return value


def runs_told(value):
    """How many runs there were, or the last ones."""
    if not isinstance(value, list):
        return amount(0, 10**9, "a number or a list,")(value)
    require(len(value) <= 20 and len(to_json(value)) <= 8000, "must be at most 20 runs, or their number")
    return [expect("mapping", run) for run in value]


ID = matching(r"[A-Za-z0-9._-]{1,64}", "must be 1 to 64 letters, digits, . _ -")
SCHEDULE = {"id": ID, "name": line_of(200), "cron": cron_text, "next_run": moment, "model": line_of(200), "slot": line_of(64),
            "duration_minutes": amount(0, 10080, "minutes"), "owner": line_of(100), "note": line_of(500), "last_run": moment,
            "last_status": line_of(100), "runs": runs_told, "registered_at": moment}
LATE_S = 300                    # a run that was not reported for so long is late


def schedule_due(entry, now):
    """(Unix time of the next run or None, whether the last one that was due is late) of a registered schedule."""
    reported, given = (parse_utc(entry[k]) if entry.get(k) else None for k in ("last_run", "next_run"))
    if "cron" in entry:
        cron = parse_cron(entry["cron"])
        owed = next_run(cron, max(reported, parse_utc(entry["registered_at"]))) if reported else None
        late = owed is not None and owed + LATE_S < now
        return (given if given and given > now else next_run(cron, now)), late
    return given, bool(given) and given + LATE_S < now and (reported is None or reported < given - LATE_S)


class Schedules:
    """What others run and when, for people to see. Nothing here is ever run."""

    def __init__(self, register, jobs):
        self.register, self._jobs = register, jobs          # jobs: the Register of our own jobs
        self._computing = threading.Lock()                  # so that one reader computes for all
        self._view = None, None                             # guarded by _computing; (minute and entries), what was computed for them

    def put(self, entry):
        self.register.change(entry["id"], lambda old: {**entry, "registered_at": utc()})

    def shown(self):
        return self.view()[0]

    def view(self):
        """(schedules with next_run, late and conflicts, all conflicts of a day to come) as of this minute."""
        with self._computing:
            mark = int(time.time() // 60), self.register.entries, self._jobs.entries
            if mark != self._view[0]:
                self._view = mark, self._compute()
            return self._view[1]

    def _compute(self):
        now, rows, wishes = time.time(), [], []
        for entry in self.register.entries.values():
            due, late = schedule_due(entry, now)
            rows.append({**entry, "next_run": utc(due) if due else None, "late": late})
            wishes += self._wishes(entry, due, now, 60 * entry.get("duration_minutes", 0))
        for job in self._jobs.entries.values():
            if job["kind"] == "swap" and job.get("enabled", True):
                wishes += self._wishes({**job, "id": f"job {job['id']}"}, None, now, 0)
        conflicts = find_conflicts(wishes)
        for row in rows:
            row["conflicts"] = [c for c in conflicts if row["id"] in c["ids"]]
        return rows, conflicts

    @staticmethod
    def _wishes(entry, due, now, seconds):
        """When in the day to come an entry wants its model, each time for at least a minute."""
        times = runs_between(parse_cron(entry["cron"]), now, now + 86400) if "cron" in entry else [due] if due else []
        for at in itertools.islice((at for at in times if "model" in entry and now < at < now + 86400), 100):
            yield entry["id"], entry.get("slot", "main"), entry["model"], at, at + max(60, seconds)


JOB = {"id": ID, "kind": choice("swap", "warm", "restart", "health"), "cron": cron_text, "missed": choice("run", "skip"),
       "model": line_of(200), "slot": line_of(64), "service": line_of(64), "enabled": boolean, "wait": amount(0, 86400, "seconds"),
       "note": line_of(500)}
JOB_NEEDS = {"swap": "model", "warm": "model", "restart": "service"}
JOB_RUN = {"started_at": moment, "ended_at": moment, "outcome": choice("running", "ok", "failed", "skipped", "interrupted"),
           "detail": line_of(500), "swap": line_of(100)}
# What is kept of a job beside what was asked: when it is due next (Unix time) and its last runs, newest first.
JOB_STATE = {"due": amount(0, 1 << 33, "Unix time"), "runs": lambda runs: [
    checked({"started_at": "", "outcome": "", **expect("mapping", run)}, JOB_RUN, "run") for run in expect("list", runs)]}


class Jobs:
    """Our own jobs: swap, warm, restart, health on a cron expression. The thread `jobs` starts what is due, each in a thread."""

    KEEP, LATE_S, LOOK_S = 20, 120, 20      # runs kept of each; later than that is `missed`; how often the wall clock is asked

    def __init__(self, register, actions, events):
        self.register, self._actions, self._events = register, actions, events  # actions: {kind: f(job, tell, swap id) -> detail}
        self._wake, self._closing = threading.Event(), threading.Event()
        self._offset = 0.0                                  # of the wall clock, as last seen; of the thread `jobs` alone
        self._lock = threading.Lock()
        self._active = set()                                # guarded by _lock; ids of jobs that run

    def shown(self):
        with self._lock:
            active = set(self._active)
        rows = [{"enabled": True, "missed": "skip", "note": "", **job, "running": job["id"] in active}
                for job in self.register.entries.values()]
        for row in rows:
            due = row.pop("due")
            row["next_run"] = utc(due) if due and row["enabled"] else None
        return rows

    def put(self, job):
        """Add or replace a job; its last runs are kept."""
        due = next_run(parse_cron(job["cron"]), time.time())
        self.register.change(job["id"], lambda old: {**job, "due": due, "runs": old["runs"] if old else []})
        self._wake.set()

    def start(self):
        """Begin. What ran when sparkctl ended is over, except a swap, which goes on and is waited for."""
        for job in list(self.register.entries.values()):
            for run in job["runs"]:
                if run["outcome"] == "running" and run.get("swap"):
                    self._begin(job, run["swap"])
                elif run["outcome"] == "running":
                    self._record(job["id"], outcome="interrupted", detail="sparkctl ended while it ran", ended_at=utc())
        forever("jobs", self._closing, self._look).start()

    def close(self):
        self._closing.set()
        self._wake.set()

    def _look(self):
        """Start what is due, then sleep until something is: not for long, since the wall clock may be set."""
        self._wake.clear()
        pause, now, offset = self.LOOK_S, time.time(), time.time() - boot_clock()
        clock_was_set, self._offset = abs(offset - self._offset) > 60, offset
        for job in list(self.register.entries.values()):
            try:
                if job.get("enabled", True) and job["due"]:
                    due = self._due(job, now, clock_was_set and job["due"] > now) if clock_was_set or job["due"] <= now else job["due"]
                    pause = min(pause, due - now)
            except Exception as e:                          # deleted meanwhile, say: that is no reason to forget the others
                log(f"job {job['id']}: {type(e).__name__}: {e}")
        self._wake.wait(max(0.0, pause))

    def _due(self, job, now, only_again=False):
        """Start a job whose time has come, or say why not -> when it is due again, which is on disk first."""
        with self._lock:
            overlaps = job["id"] in self._active
        missed = now - job["due"] > self.LATE_S and job.get("missed", "skip") == "skip"
        why = "its last run was not over" if overlaps else \
            f"it was due at {utc(job['due'])}, and sparkctl did not run or the clock was set" if missed else ""
        run = {"started_at": utc(now), **({"ended_at": utc(now), "outcome": "skipped", "detail": why} if why else
                                          {"outcome": "running", "detail": "started"})}
        due = next_run(parse_cron(job["cron"]), now) or now + 10 * 366 * 86400
        if only_again and due == job["due"]:
            return due

        def again(old):
            runs = job["runs"] if only_again else [run, *job["runs"]]
            kept = [r for n, r in enumerate(runs) if n < self.KEEP or r["outcome"] == "running"]
            return {**job, "due": due, "runs": kept} if old is job else old     # else it was changed or deleted meanwhile
        if self.register.change(job["id"], again, must=False)["due"] == due and not why and not only_again:
            self._begin(job)
        return due

    def _begin(self, job, swap=""):
        with self._lock:
            self._active.add(job["id"])
        try:
            threading.Thread(target=self._run, args=(job, swap), name="job", daemon=True).start()
        except RuntimeError as e:                           # no more threads
            self._end(job, "failed", str(e))

    def _run(self, job, swap):
        try:
            outcome, detail = "ok", self._actions[job["kind"]](job, lambda **facts: self._record(job["id"], **facts), swap)
        except (Refused, Answered) as e:
            outcome, detail = "failed", str(e) or "it was deleted or changed meanwhile"
        except Exception as e:
            log(f"job {job['id']}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
            outcome, detail = "failed", "an internal error; sparkctl's own log has it"
        if not self._closing.is_set():                      # else it is not the job's end but ours
            self._end(job, outcome, detail)

    def _end(self, job, outcome, detail):
        self._record(job["id"], outcome=outcome, detail=printable(detail, 500), ended_at=utc())
        with self._lock:
            self._active.discard(job["id"])
        self._events("job_" + outcome, f"job {job['id']} ({job['kind']}): {detail}", job=job["id"])

    def _record(self, key, **facts):
        """Tell more of a job's run that is not over, of which there is one; the job may be gone."""
        def tell(job):
            return job and {**job, "runs": [{**run, **facts} if run["outcome"] == "running" else run for run in job["runs"]]}
        with contextlib.suppress(Refused):
            self.register.change(key, tell, must=False)


# === 11 weights ===============================================================
# What is on the Sparks' disks: list it, download, copy from Spark to Spark, delete. The work of a transfer is a process
# of the Spark's own, begun at most once (begin_once); a thread of ours looks at it once a second, and so does the next
# sparkctl after a restart. A Spark that does not answer meanwhile is waited for.


def disk_script(repo="", local=()):
    """A look at a Spark's cache, or at one repo of it, and at local models, ((key, path), …); lines for parse_disk. Changes nothing."""
    # stat follows links: into blobs/, and from there into the store that huggingface_hub 2 shares between repos
    rows = "\n".join(f"[ ! -d {p} ] || row local {quote_arg(key)} {p} {p}" for key, path in local for p in [quote_arg(path)])
    return HUB + SNAPSHOT + WEIGHTS_COMPLETE + f"""row() {{
  echo "$1 $(printf %s "$2" | tr -c 'A-Za-z0-9._-' '?')"; lacks "$4" "$3"
  echo promised $(cat "$4"/*.index.json 2>/dev/null | grep -oE '"total_size": *[0-9]+' | grep -oE '[0-9]+$' | sort -n | tail -n 1)
  find "$3/" \\( -type f -o -type l \\) -exec stat -L -c 'file %d %i %s %f %X %Y' {{}} + 2>/dev/null | sort -u
}}
LC_ALL=C p=$h; export LC_ALL
while [ ! -d "$p" ]; do p=$(dirname "$p"); done
stat -f -c 'disk %S %b %a' "$p"; echo "hub $(printf %s "$h" | tr -c 'A-Za-z0-9._/@+=-' '?')"
for r in "$h"/{quote_arg(repo_dir(repo)) if repo else "models--*"}; do
  [ ! -d "$r" ] || {{ snapshot "$r"; row repo "${{r##*/}}" "$r" "$s"; }}
done
{rows}
exit 0
"""


def parse_disk(out):
    """disk_script's output -> ({hub, total_bytes, free_bytes}, [row]); lines that do not fit are passed over.

    A row has name (of the directory, with ? for what no repo's name has; a local model's key), local, missing, bytes,
    promised (by the index; 0 = unknown), used and modified (Unix times), and files: {(device, inode): bytes}.
    """
    facts, rows = {"hub": "", "total_bytes": 0, "free_bytes": 0}, []
    fits = functools.partial(re.fullmatch, flags=re.ASCII)
    for line in out.splitlines():
        kind, _, said = line.partition(" ")
        row = rows[-1] if rows else None
        if kind in ("repo", "local"):
            rows.append({"name": printable(said, 300), "local": kind == "local", "missing": [], "files": {},
                         **dict.fromkeys(("bytes", "promised", "largest", "used", "modified"), 0)})
        elif kind == "hub":
            facts["hub"] = printable(said)
        elif kind == "disk" and (m := fits(r"(\d{1,9}) (\d{1,15}) (\d{1,15})", said)):
            facts.update(total_bytes=int(m[1]) * int(m[2]), free_bytes=int(m[1]) * int(m[3]))
        elif kind == "missing" and row:
            row["missing"].append(printable(said, 200))
        elif kind == "promised" and row and fits(r"\d{1,18}", said):
            row["promised"] = int(said)
        elif kind == "file" and row and (m := fits(r"(\d{1,20} \d{1,20}) (\d{1,18}) 8[0-9a-f]{3} (\d{1,10}) (\d{1,10})", said)):
            size, used, modified = map(int, m.groups()[1:])         # 8…: a regular file
            row["bytes"] += size - row["files"].get(m[1], 0)
            row["files"][m[1]] = size
            row["modified"] = max(row["modified"], modified)
            if size >= row["largest"]:                              # the small ones are read by looks like this one
                row.update(largest=size, used=used)
    return facts, rows


def shown_disk(facts, rows, models, in_use):
    """What parse_disk found as /api/disk shows it. models: directory or key -> keys of the models that use it; in_use: such keys."""
    owners = collections.Counter(f for row in rows for f in row["files"])
    once = {f: n for row in rows for f, n in row["files"].items()}
    return {**facts, "used_bytes": sum(once.values()), "repos": [
        {"name": row["name"], "repo": None if row["local"] else row["name"][8:].replace("--", "/"), "local": row["local"],
         "bytes": row["bytes"], "shared_bytes": sum(n for f, n in row["files"].items() if owners[f] > 1),
         "complete": not row["missing"], "missing": row["missing"],
         "used_at": utc(row["used"]) if row["used"] else None, "modified_at": utc(row["modified"]) if row["modified"] else None,
         "models": (keys := models.get(row["name"], [])), "serving": bool(in_use & set(keys))}
        for row in sorted(rows, key=lambda row: -row["bytes"])]}


def weights_used_by(model, config, book, served):
    """Why the weights of model must stay where they are, or "". served: slot -> names that its engine answers to."""
    same = {m.key for m in config.models.values() if m.source == model.source}
    named = re.compile(rf"(?<![\w./-]){re.escape(model.source)}(?![\w/-])")        # also as the draft of another model
    for slot, plan in book.slots.items():
        if plan.model in same or named.search(plan.launch):
            return f"slot {slot} serves {plan.model}"
    for slot, answers in served.items():
        if any(name == model.source or (m := config.find(name)) and m.key in same for name in answers):
            return f"slot {slot} serves {answers[0]}"
    for s in filter(None, (book.running, book.waiting)):
        plans = [p for p in (s.plan, s.previous) if p]
        if {s.model, s.from_model, *(p.model for p in plans)} & same or any(named.search(p.launch) for p in plans):
            return f"a swap on {s.slot} needs it ({s.phase})"
    return ""


# --- what a transfer runs on a Spark

def download_command(repo, launch_dir):
    """Shell text that downloads a repo into the cache, with the launcher's own script or with Hugging Face's program."""
    # The token stays in the environment of that process: the Spark's own login, or the one the launcher gives containers.
    # Without the shared store a repo is whole in its own directory, which can be copied and deleted.
    q = quote_arg(repo)
    return HUB + f"""l={quote_path(launch_dir)}
export PATH="$HOME/.local/bin:$PATH" HF_HUB_CACHE="$h" HF_HUB_DISABLE_PROGRESS_BARS=1 HF_HUB_DISABLE_SHARED_BLOBS=1
if [ -z "$HF_TOKEN" ] && [ ! -s "${{HF_TOKEN_PATH:-${{HF_HOME:-$HOME/.cache/huggingface}}/token}}" ]; then
  t=$(sed -n "s/^ *CONTAINER_HF_TOKEN=[\\"']*\\(hf_[A-Za-z0-9_]*\\).*/\\1/p" "$l/.env" 2>/dev/null | tail -n 1)
  [ -z "$t" ] || export HF_TOKEN="$t"
fi
if [ -x "$l/hf-download.sh" ] && command -v uvx >/dev/null; then exec "$l/hf-download.sh" {q}; fi
for p in hf huggingface-cli; do command -v $p >/dev/null && exec $p download {q}; done
echo "neither uvx nor hf is installed"; exit 127
"""


def copy_command(repo, far, hub, pull):
    """Shell text that copies a repo to the cache `hub` of far (user@host), or with pull from there."""
    # The slash after the directory matters: without it rsync takes a link into the shared store for a safe one, and
    # would copy the link without what it leads to. Blobs come before snapshots, so half a copy never looks complete.
    there, here = quote_arg(f"{far}:{hub}/{repo_dir(repo)}/"), f'"$h"/{quote_arg(repo_dir(repo))}/'
    return HUB + f"""command -v rsync >/dev/null || {{ echo "rsync: not found"; exit 127; }}
exec rsync -a --mkpath --copy-unsafe-links --partial-dir=.rsync-partial --exclude='*.incomplete' \\
  -e 'ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10' {f"{there} {here}" if pull else f"{here} {there}"}
"""


def job_script(name, command):
    """Begin command at most once; says `job running`, `job lost` or `job` and its exit code, and then how its output ends."""
    # by its command line, since after a reboot the number may be another process's
    lives = f'grep -qaF -e {quote_arg(name)} "/proc/$(cat "$d/pid" 2>/dev/null)/cmdline" 2>/dev/null'
    return begin_once(name, command) + f"""i=0
while [ ! -e "$d/rc" ] && ! {lives} && [ $i -lt 30 ]; do sleep 0.1; i=$((i+1)); done
if [ -e "$d/rc" ]; then echo "job $(cat "$d/rc")"; elif [ $i -lt 30 ]; then echo job running; else echo job lost; fi
tail -c 8000 "$d/out" 2>/dev/null
exit 0
"""


def delete_script(repo):
    """Remove a repo from the cache by Hugging Face's own program, or if it is whole in its own directory; says `freed BYTES`."""
    # Files of the shared store belong to several repos: only hf knows which of them are needed no more.
    r = quote_arg(repo_dir(repo))
    return HUB + f"""r=$h/{r} PATH=$HOME/.local/bin:$PATH; export PATH
rm -rf "$h"/.trash-*-models--*             # what an interrupted one left
[ -e "$r" ] || [ -L "$r" ] || {{ echo freed 0; exit 0; }}
no() {{ echo "$*"; exit 3; }}
[ "$(cd "$r" && pwd -P)" = "$(cd "$h" && pwd -P)/"{r} ] || no "$r is not a directory of its own in the cache; remove it by hand"
[ -z "$(find "$r" -type d ! -writable | head -n 1)" ] || no "files there belong to another user: sudo chown -R \\"\\$USER\\" $r"
used() {{ du -s -c -B1 "$r" "$h/blobs" 2>/dev/null | tail -n 1 | cut -f 1; }}
b=$(used)
hf cache rm --help >/dev/null 2>&1 && hf cache rm model/{quote_arg(repo)} --cache-dir "$h" --yes >/dev/null 2>&1
if [ -e "$r" ]; then
  [ -z "$(find "$r/blobs" -type l 2>/dev/null | head -n 1)" ] ||
    no "its files are in the store shared by all repos: install hf there (pip install -U huggingface_hub) and delete again"
  t=$h/.trash-$$-{r}; mv "$r" "$t" && rm -rf "$t" || no "could not be removed whole: see $t"
fi
a=$(used); echo "freed $((b - ${{a:-0}}))"
"""


TRANSFER_FAILURES = (   # before FATAL: (pattern, code, what happened, what to do); {at}: the Spark it ran on, {to}: the one that gets it
    (r"(?i)repository ?not ?found|(?:Model|Repository) '[^']*' not found", "repo_not_found",
     "Hugging Face has no such repo, or hides it from {at}", "mend repo in the catalog; if it is private, log in on {at}: hf auth login"),
    (r"requires approval|gated repo", "gated_repo", "Hugging Face refuses access to the repo",
     "accept the model's licence, and log in on {at}: hf auth login"),
    (r"neither uvx nor hf|'uvx' command not found", "downloader_missing", "neither uvx nor hf is installed on {at}",
     "install uv there: curl -LsSf https://astral.sh/uv/install.sh | sh"),
    (r"rsync: (?:command )?not found", "rsync_missing", "rsync is not installed on {at} or {to}", "on both: sudo apt-get install -y rsync"),
    (r"Host key verification failed|HOST IDENTIFICATION HAS CHANGED|Permission denied \((?!13)", "copy_refused",
     "{at} may not log in where it copies to or from", "{at} and {to} must reach each other by ssh without a question: try it by hand"),
    (r"\[Errno 13\]|Permission denied \(13\)", "not_writable", "files in the cache belong to another user",
     "on {to}: sudo chown -R $USER ~/.cache/huggingface"),
    (r"name resolution|Name or service not known|Network is unreachable|No route to host|Connection refused|ConnectError|"
     r"ConnectionError|Max retries|offline mode", "no_network", "{at} does not reach what it copies from",
     "mend its network and begin again: what is there is kept"))


def transfer_failure(said, code, at, to):
    """The end of a failed process's output and its exit code -> the error that people see."""
    lines = [printable(re.sub(r"hf_\w{6,}", "hf_***", line), 400) for line in said.splitlines() if line.strip()][-20:]
    fatal = min((s for s in map(classify_log_line, lines) if s.kind == "fatal"), key=lambda s: s.rank, default=None)
    what = ("download_failed", f"it ended on {at} with exit code {code}", "see its last lines; begun again, it goes on with what is there")
    if known := next((row[1:] for row in TRANSFER_FAILURES if re.search(row[0], said)), None):
        what = [part.format(at=at, to=to) for part in known]
    elif fatal:
        what = fatal.code, fatal.text, fatal.remedy
    return {**dict(zip(("code", "message", "remedy"), what)), "log_tail": lines}


def parse_steps(rows):
    require(rows, "must not be empty")
    return [[choice("download", "copy", "delete")(kind), host_name(host), printable(cache)] for kind, host, cache in rows]


# A transfer as transfers.json keeps it. steps: [[download | copy | delete, Spark that gets them, cache at the other end of
# a copy], …]; attempt: of the step, since a process that was lost, in a reboot for one, is begun again.
TRANSFER_NEEDS = {**dict.fromkeys(("id", "model", "source"), line_of(64)), "repo": validate_repo, "client": printable, "steps": parse_steps,
                  "state": choice("running", "complete", "failed", "cancelled"),
                  **dict.fromkeys(("step", "attempt", "total_bytes"), amount(0, 1 << 60, "a number"))}
TRANSFER = {**TRANSFER_NEEDS, "started_at": moment, "ended_at": moment, "note": printable, "cancelling": boolean,
            "error": functools.partial(expect, "mapping")}


def on_hosts(t):
    return {t["source"], *(host for _, host, _ in t["steps"])}


def job_of(t):
    """The name of what runs on the Spark now for a transfer."""
    return f"{t['id']}-{t['step']}-{t['attempt']}"


def moving_with(t):
    """The refusal of who comes while a transfer runs."""
    what, cancel = t["steps"][t["step"]][0], f", or cancel it first: DELETE /api/models/{t['model']}/download"
    return Refused(409, "transfer_running", f"a {what} of {t['model']} is running on {', '.join(sorted(on_hosts(t)))}: wait for its end"
                   + (cancel if what != "delete" else ""), transfer=t["id"])


class Transfers:
    """What moves and removes weights. For each Spark a thread `weights-NAME` looks at the transfer that it is the source of."""

    KEEP, ATTEMPTS, LOOK_S = 20, 5, 60                      # transfers that are over; tries of a step; limit of one remote call
    LINE_LOST = ("10", "12", "20", "30", "35", "255")       # rsync's exit codes for a lost connection, and ssh's (rsync(1), EXIT VALUES)
    NOTHING = {"bytes": 0, "bytes_per_second": 0, "eta_seconds": None, "waits_for": ""}

    def __init__(self, register, config, hosts, hub, events):
        self.register, self._config, self._hosts, self._hub, self._events = register, config, hosts, hub, events
        self._now = {}      # Spark -> (job, how far it is: see NOTHING), replaced whole by the Spark's thread
        self._seen = {name: collections.deque(maxlen=30) for name in hosts.sparks}      # (job, when, bytes), of that thread alone
        self._closing = hub.closing             # what runs on the Sparks goes on, and the next start looks again

    def start(self):
        for t in self.running():                # what we cannot go on with
            if t["steps"][0][0] == "delete" or t["step"] not in range(len(t["steps"])) or not on_hosts(t) <= self._hosts.sparks.keys():
                why = "sparkctl was stopped, or a Spark is no longer configured"
                self._end(t, "failed", {"code": "interrupted", "message": why, "remedy": "begin again", "log_tail": []})
        for name in self._hosts.sparks:
            forever("weights-" + name, self._closing, functools.partial(self._work, name)).start()

    def running(self):
        return [t for t in self.register.entries.values() if t["state"] == "running"]

    def failed(self):
        """Those that failed, and after which none of the same model began."""
        last = {t["model"]: t for t in self.register.entries.values()}
        return [t for key, t in last.items() if t["state"] == "failed" and key in self._config().models]

    def shown(self, rows=None):
        """rows, or the last ten, as the API shows them, newest first."""
        for t in reversed(list(self.register.entries.values())[-10:] if rows is None else rows):
            kind, host, _ = t["steps"][min(int(t["step"]), len(t["steps"]) - 1)]
            job, now = self._now.get(t["source"], ("", {}))
            now = {**self.NOTHING, **(now if job == job_of(t) else {})}
            done = now["bytes"] = t["total_bytes"] if t["state"] == "complete" else now["bytes"]
            yield {**t, **now, "phase": kind, "host": host, "hosts": sorted(on_hosts(t)),
                   "fraction": round(min(1.0, done / t["total_bytes"]), 4) if t["total_bytes"] else None}

    # --- asking

    def look(self, name, *what):
        """One Spark's disk -> (facts, rows) of parse_disk. Raises Refused 502."""
        got = self._hosts.run(name, disk_script(*what), self.LOOK_S)
        if got.kind != "ok":
            raise Refused(502, "spark_unreachable", f"{name}: {why_not(got)}", remedy=remedy_for(got, self._hosts.sparks[name]))
        return parse_disk(got.out)

    def disk(self, in_use):
        """Every Spark's disk, and the last transfers; a Spark that does not answer costs its own row."""
        models, users = self._config().models.values(), collections.defaultdict(list)
        for m in models:
            users[repo_dir(m.repo) if m.repo else m.key].append(m.key)
        local = [(m.key, m.local_path) for m in models if m.local_path]

        def row(name):
            try:
                return {"host": name, **shown_disk(*self.look(name, "", local), users, in_use)}
            except Refused as e:
                return {"host": name, "error": str(e), **e.details}
        return {"hosts": list(self._hosts.each(self._hosts.sparks, row).values()), "transfers": list(self.shown())}

    def _add(self, what, model, source, steps, client, must=True, **more):
        """Take the Sparks for a transfer -> it. Raises Refused 409, 503."""
        new = {"id": f"{what}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(4)}", "model": model.key, "repo": model.repo,
               "source": source, "steps": steps, "client": client, "started_at": utc(), "state": "running",
               "step": 0, "attempt": 0, "total_bytes": 0, **more}

        def put(old):                           # the register holds its lock, so of two that want a Spark one sees the other
            for t in self.running():
                if on_hosts(t) & on_hosts(new) and (t["repo"] == model.repo or "delete" not in (what, t["steps"][0][0])):
                    raise moving_with(t)
            return new
        for old in [t["id"] for t in self.register.entries.values() if t["state"] != "running"][:-self.KEEP]:
            self._drop(old)
        return self.register.change(new["id"], put, must)

    def _caches(self, names):
        """names, but of the Sparks that are this machine only one: they have one cache."""
        return [name for name in names if name not in [n for n in names if self._hosts.sparks[n].local][1:]]

    def begin(self, model, names, client):
        """Bring the weights of model to the Sparks of those names -> its id, or None if all have them. Raises Refused 409, 502, 503."""
        names = self._caches(names)
        sparks, looks = self._hosts.sparks, self._hosts.each(names, lambda name: self.look(name, model.repo))
        has = {name: rows[0]["bytes"] if rows else 0 for name, (_, rows) in looks.items()}
        complete = [name for name in names if looks[name][1] and not looks[name][1][0]["missing"]]
        source = [*complete, *names][0]
        wanted = [name for name in names if name not in complete]
        total = has[source] if complete else int(model.size_gb * GIB)
        steps = [["download" if name == source else "copy", name, looks[source if sparks[name].local else name][0]["hub"]]
                 for name in wanted]
        for kind, name, cache in steps:
            wants, free = (n / GIB for n in (total - has[name], looks[name][0]["free_bytes"]))
            if free < wants:
                said = f"{model.key} needs {wants:.1f} GB on {name}, and {free:.1f} GB are free: delete models that are not needed"
                raise Refused(409, "disk_full", said, host=name, needed_gb=round(wants, 1), free_gb=round(free, 1))
            if kind == "copy" and not re.fullmatch(r"/[\w./@+=-]+", cache, re.ASCII):
                raise Refused(409, "odd_cache", f"{cache} has characters that rsync's other side would not take; name one Spark at a time")
        if not wanted:
            return None
        note = "" if total else "its size is not known, so free space was not checked"
        t = self._add("download", model, source, steps, client, total_bytes=total, note=note)
        said = f"{client} asked for {model.key} on {', '.join(wanted)}"
        self._events("download_started", said, transfer=t["id"], model=model.key, client=client)
        return t["id"]

    def cancel(self, key, client):
        """End the running transfers of a model; told again, also where a Spark does not answer -> their ids. Raises Refused 404."""
        mine = [t for t in self.running() if t["model"] == key and t["steps"][0][0] != "delete"]
        if not mine:
            raise Refused(404, "no_transfer", f"no transfer of {key} is running: there is nothing to cancel (GET /api/disk lists the last ones)")
        for t in mine:
            if t.get("cancelling"):
                self._end(t, "cancelled")
            else:
                self._set(t, cancelling=True, note=f"{client} cancelled it")
        return [t["id"] for t in mine]

    def deleting(self, repo):
        return any(t["repo"] == repo and t["steps"][0][0] == "delete" for t in self.running())

    def delete(self, model, names, client, refuse):
        """Remove model's repo from the Sparks of those names -> [{host, freed_bytes}]. Raises Refused 409, 502 with what came of each."""
        def remove(name):
            got = self._hosts.run(name, delete_script(model.repo), 600)
            said = printable((got.out.strip().splitlines() or [""])[-1], 300)
            if got.kind == "ok" and (m := re.fullmatch(r"freed (-?[0-9]{1,18})", said)):
                return {"host": name, "freed_bytes": max(0, int(m[1]))}
            why = said if got.reached and said else why_not(got)
            return {"host": name, "freed_bytes": 0, "error": why, "remedy": remedy_for(got, self._hosts.sparks[name])}
        names = self._caches(names)
        # a full disk of ours is no reason not to make room
        t = self._add("delete", model, names[0], [["delete", name, ""] for name in names], client, must=False)
        try:
            refuse()                            # again: from here on a swap to it fails its checks
            rows = list(self._hosts.each(names, remove).values())
        finally:
            self._drop(t["id"])
        bad, gone = [row for row in rows if "error" in row], [row["host"] for row in rows if "error" not in row]
        if gone:
            said = f"{client} deleted {model.repo} on {', '.join(gone)}: {sum(row['freed_bytes'] for row in rows) / GIB:.1f} GB"
            self._events("weights_deleted", said, model=model.key, client=client)
        if bad:
            raise Refused(502, "delete_failed", "; ".join(f"{row['host']}: {row['error']}: {row['remedy'] or 'mend that'}" for row in bad) + "; then delete again", hosts=rows)
        return rows

    # --- acting

    def _set(self, t, **facts):
        """Change t, unless it is over by now, and keep it."""
        with contextlib.suppress(Refused):      # or forgotten
            self.register.change(t["id"], lambda now: now and {**now, **(facts if now["state"] == "running" else {})}, must=False)

    def _drop(self, id_):
        with contextlib.suppress(Refused):
            self.register.change(id_, lambda t: None, must=False)

    def _end(self, t, state, error=None):
        """The transfer is over: tell, unless somebody did."""
        if t["id"] not in [now["id"] for now in self.running()]:
            return
        names_ = ", ".join(host for _, host, _ in t["steps"])
        said = {"complete": f"{t['model']} is on {names_}", "cancelled": f"the transfer of {t['model']} was cancelled",
                "failed": f"{t['model']} did not get to {names_}: {(error or {}).get('message')}"}[state]
        self._set(t, state=state, ended_at=utc(), **({"error": error} if error else {}))
        self._events("download_" + state, said, transfer=t["id"], model=t["model"], client=t["client"])

    def _work(self, name):
        """What the thread of a Spark does again and again: one look at its transfer, or wait for one."""
        mine = lambda: next((t for t in self.running() if t["source"] == name and t["steps"][0][0] != "delete"), None)
        if self._hub.wait_for(lambda: self._closing.is_set() or mine(), 60) and (t := mine()):
            with contextlib.suppress(Cancelled):
                self._closing.wait(self._look(t))

    def _look(self, t):
        """One look at the running step of t; tells how many seconds later to look again. Raises Cancelled when we close."""
        (kind, host, cache), sparks, cancelling = t["steps"][t["step"]], self._hosts.sparks, t.get("cancelling")
        pull = kind == "copy" and sparks[host].local
        at, far = host if kind == "download" or pull else t["source"], sparks[t["source"] if pull else host]
        address = self._hosts.address(far.name)
        login = (f"{far.user}@" if far.user else "") + (f"[{address}]" if ":" in address else address)
        command = copy_command(t["repo"], login, cache, pull)
        if kind == "download":
            command = download_command(t["repo"], self._config().settings["LAUNCH_DIR"])
        script = end_launch_script(job_of(t)) if cancelling else job_script(job_of(t), command)
        got = self._hosts.run(at, script, self.LOOK_S, self._closing)
        try:
            if not got.reached:
                raise Refused(502, "spark_unreachable", f"{at}: {why_not(got)}")
            rows = [] if cancelling else self.look(host, t["repo"])[1]      # after the job's word: done means that all is there
        except Refused as e:
            self._tell(t, waits_for=str(e), bytes_per_second=0, eta_seconds=None)
            return 3
        word = re.search(r"^job (running|lost|[0-9]{1,3})$", got.out, re.M)     # a login shell may have had its say before
        first, said = (word[1], got.out[word.end():]) if word else (str(got.code), got.err)
        row = rows[0] if rows else {"bytes": 0, "promised": 0, "missing": ["any file"]}
        if cancelling:
            self._end(t, "cancelled")
        elif first == "running":
            self._measured(t, row["bytes"], kind == "download" and row["promised"] or t["total_bytes"])
        elif first != "0":
            error = transfer_failure(said, first, at, host)
            again = first == "lost" or kind == "copy" and first in self.LINE_LOST and error["code"] in ("download_failed", "no_network")
            if again and t["attempt"] + 1 < self.ATTEMPTS:
                self._set(t, attempt=t["attempt"] + 1, note=f"was interrupted on {at}, and goes on with what is there")
                return 3
            self._end(t, "failed", error)
        elif row["missing"]:
            message = f"the download said that it was done, and {host} is without {', '.join(row['missing'][:3])}"
            self._end(t, "failed", {**transfer_failure(said, first, at, host), "code": "incomplete", "message": message})
        elif t["step"] + 1 < len(t["steps"]):
            self._set(t, step=t["step"] + 1, attempt=0, total_bytes=row["bytes"])
        else:
            self._set(t, total_bytes=row["bytes"])
            self._end(t, "complete")
        return 1

    def _tell(self, t, **facts):
        """Publish how far t is; long-polls wake when a person would see the difference."""
        job, old = self._now.get(t["source"], ("", {}))
        new = {**self.NOTHING, **(old if job == job_of(t) else {}), **facts}
        unit = t["total_bytes"] // 100 or 100 << 20
        self._now[t["source"]] = job_of(t), new
        if job != job_of(t) or (old["bytes"] // unit, old["waits_for"]) != (new["bytes"] // unit, new["waits_for"]):
            self._hub.bump()

    def _measured(self, t, done, total):
        """Tell how much of the running step is there, and how fast it grows."""
        seen = self._seen[t["source"]]
        if seen and seen[-1][0] != job_of(t):
            seen.clear()
        seen.append((job_of(t), time.monotonic(), done))
        seconds, grown = seen[-1][1] - seen[0][1], done - seen[0][2]
        rate = max(0.0, grown / seconds) if seconds else 0.0
        if total != t["total_bytes"]:
            self._set(t, total_bytes=total)
        eta = round((total - done) / rate, 1) if rate and total > done else None
        self._tell(t, waits_for="", bytes=done, bytes_per_second=round(rate), eta_seconds=eta)


# === 12 monitor ===============================================================
# Who looks at Sparks, slots and services, one thread each; what they saw last is all that others read.


class SlotView(NamedTuple):
    """What a slot was last seen to do."""
    probe: Probe
    since: str                  # when it was first seen so


class ServiceView(NamedTuple):
    """What a service was last seen to do."""
    state: str                  # serving, loading, down, unreachable, unknown
    detail: str = ""
    facts: dict = {}            # what its kind tells: model, voices, collections, ...
    since: str | None = None    # when it was first seen in this state
    seen_at: str | None = None  # when it last answered
    failures: int = 0


class SparkView(NamedTuple):
    """What a Spark last told."""
    state: str                  # ok, stale (not heard of for too long), unreachable, unknown
    detail: str = ""
    remedy: str = ""
    seen_at: str | None = None
    memory: dict | None = None  # total_gb, available_gb, swap_free_gb, pressure: % of the last 10 s that work stood still for memory
    failures: int = 0           # looks in a row that failed
    gpu: dict | None = None     # busy (%), power_w, temperature_c, clock_mhz, driver
    temperature_c: float | None = None
    load: float | None = None
    disk: dict | None = None
    links: list = []
    fabric: int = 0             # ConnectX ports that are active
    uptime_s: float | None = None
    containers: dict = {}       # name -> docker's words on its state
    ledger: dict | None = None
    heard: float = 0.0          # monotonic time of the last answer

    def public(self):
        return {k: v for k, v in self._asdict().items() if k != "heard"}

    def noticed(self):
        """What of it a person would notice changing: not that time goes by."""
        words = tuple(re.sub(r"(Up|ago|\)) .*?(?=\(|$)", r"\1 ", said) for said in self.containers.values())
        return self._replace(seen_at=None, load=None, uptime_s=None, heard=0.0, containers=(*self.containers, *words),
                             ledger=None, gpu=self.gpu and {**self.gpu, "clock_mhz": None})


def spark_view(facts, owners, old, light):
    """parse_spark's facts -> SparkView; after a light look the rest is as it was."""
    whole = lambda given: given and {k: round(v) if isinstance(v, float) else v for k, v in given.items()}
    gb = lambda name: round(facts["memory"][name], 1) if name in facts["memory"] else None
    memory, gpu, told = facts["memory"], facts["gpu"], []
    if not memory and facts["hangs"] == "files":
        return old._replace(state="unknown", detail="its answer tells nothing of a Spark; does its login shell run commands?", failures=old.failures + 1)
    told += [] if "MemTotal" in memory else ["memory unknown"]
    told += [f"{facts['hangs']} hangs on the Spark"] if facts["hangs"] else []
    told += [f"{program} {what[0]}" for program, what in facts["failed"].items()]
    view = (old if light else SparkView(""))._replace(
        state="ok", detail="answers; " + ", ".join(told) if told else "", remedy="", seen_at=utc(), failures=1 if facts["hangs"] else 0,
        heard=time.monotonic(), gpu=whole(gpu), memory={
            "total_gb": gb("MemTotal"), "available_gb": gb("MemAvailable"), "swap_free_gb": gb("SwapFree"),
            "pressure": facts["pressure"]} if "MemTotal" in memory else None)
    if light:
        return view._replace(ledger=None)       # it changes as engines go and come
    return view._replace(
        temperature_c=facts["temperature_c"] and round(facts["temperature_c"]), ledger=ledger(facts, owners),
        containers=dict((facts["containers"] or {}).values()), **{k: facts[k] for k in ("load", "disk", "links", "fabric", "uptime_s")})


class History:
    """What was measured, in rings: an hour at most as it was looked at, a day by the minute. Lost with the process."""

    ENGINE = ("running", "waiting", "kv_use", "tokens_per_s")
    FIELDS = {"sparks": ("available_gb", "gpu_busy", "power_w", "temperature_c"), "slots": ENGINE, "services": ENGINE}

    def __init__(self):
        self._lock = threading.Lock()
        self._rings = {}                        # guarded by _lock; (what, name) -> (looks, minutes, looks of the running minute)

    def add(self, now, rows, watched):
        """rows: {(what, name): values of FIELDS[what], None where unknown}, at now, Unix time; watched: {what: names}, others are forgotten."""
        with self._lock:
            for key, values in rows.items():
                looks, minutes, minute = self._rings.setdefault(key, (collections.deque(maxlen=720), collections.deque(maxlen=1440), []))
                if minute and (minute[0][0] // 60 != now // 60 or len(minute) > 120):
                    known = [[v for v in column if v is not None] for column in list(zip(*minute))[1:]]
                    minutes.append((minute[0][0] // 60 * 60, *(round(statistics.fmean(v), 3) if v else None for v in known)))
                    minute.clear()
                looks.append((now, *values))
                minute.append(looks[-1])
            self._rings = {key: ring for key, ring in self._rings.items() if key[1] in watched[key[0]]}

    def read(self, now, minutes):
        """{"minutes", what: {name: {"at": […], field: […], of a Spark also "hours"}}}, by the minute where the looks do not reach back so far."""
        with self._lock:
            rings = {key: (list(ring[0]), list(ring[1])) for key, ring in self._rings.items()}
        told = {"minutes": minutes, **{what: {} for what in self.FIELDS}}
        for (what, name), (looks, by_minute) in rings.items():
            since = now - 60 * minutes
            fine = minutes <= 60 and (len(looks) < 720 or looks[0][0] <= since)
            columns = list(zip(*((utc(row[0]), *row[1:]) for row in (looks if fine else by_minute) if row[0] >= since)))
            told[what][name] = dict(zip(("at", *self.FIELDS[what]), columns or [()] * 5))
            if what == "sparks":
                hours = itertools.groupby((row for row in by_minute if row[2] is not None), lambda row: row[0] // 3600 * 3600)
                told[what][name]["hours"] = [{"at": utc(at), "gpu_busy": round(statistics.fmean(row[2] for row in rows), 1)}
                                             for at, rows in hours]
        return told


class Box(NamedTuple):
    """What a Spark told during a swap, second by second."""
    swap: str
    samples: tuple = ()         # (Unix time, available GiB, pressure %, power W), the last 60

    def public(self):
        """When it answered last, and what it told until then."""
        fields = ("available_gb", "pressure", "power_w")
        return {"lost_at": utc(self.samples[-1][0]), "samples": [{"at": utc(at), **dict(zip(fields, row))} for at, *row in self.samples]}


def prometheus(families):
    """Text format 0.0.4 of (name, type, help, [(suffix, {label: value}, number or None)]); None: not known, so not told."""
    escape = lambda value: str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r'\"')
    lines = []
    for name, kind, told, samples in families:
        lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
        for suffix, labels, value in (row for row in samples if row[2] is not None):
            inner = ",".join(f'{k}="{escape(v)}"' for k, v in labels.items())
            lines.append(f"{name}{suffix}{f'{{{inner}}}' if inner else ''} {repr(float(value)).replace('inf', '+Inf')}")
    return ("\n".join(lines) + "\n").encode("utf-8", "replace")


LOOK_S = 15                     # that a look at a Spark may take
WEDGE_LOOKS, WEDGE_W, WEDGE_CANARY_S = 3, 30.0, 20.0    # looks without a token; a Spark that works takes more; what one token may take


def pause_after(poll, failures):
    """Seconds to the next look at what failed so often in a row; the jitter keeps several from asking together."""
    return min(60, poll * 2 ** min(failures, 9)) * (0.8 + 0.4 * secrets.randbelow(100) / 100) if failures else poll


class Monitor:
    """The polling threads and what they saw."""

    def __init__(self, store, hosts, hub, events):
        self._store, self._hosts, self._hub, self._events = store, hosts, hub, events
        self.manager = None                     # set once, before start()
        self._lock = threading.Lock()
        self._slots = {}                        # guarded by _lock; name -> SlotView
        self.served = {}                        # replaced under _lock; slot -> ids it answers to, all that the data path looks at
        self._sparks = {}                       # name -> SparkView, replaced whole by the one thread of that Spark
        self._services = {}                     # name -> ServiceView, replaced whole by the one thread of that service
        self._vitals = {}                       # slot-NAME or service-NAME -> Vitals, likewise
        self._boxes = {}                        # Spark -> Box of its last swap, replaced whole by the one thread of that Spark
        self.history = History()
        self._noticed = None                    # what the last bump told; of the thread `history` alone
        self._watched = set()                   # names of threads; added by start(), then by the thread `config`; each takes itself out
        self._closing = hub.closing

    def start(self):
        for name in self._store.sparks:
            forever("spark-" + name, self._closing, functools.partial(self._look_at_spark, name)).start()
        self._watch()
        forever("config", self._closing, self._look_at_config).start()
        forever("history", self._closing, self._tick).start()

    def _watch(self):
        """A thread for every slot and service that has none yet."""
        layout = self._store.current.layout
        for what, names_, look in (("slot-", layout.slots, self._look_at_slot), ("service-", layout.services, self._look_at_service)):
            for name in names_:
                if what + name not in self._watched:
                    self._watched.add(what + name)
                    forever(what + name, self._closing, functools.partial(look, name)).start()

    def slot(self, name):
        with self._lock:
            return self._slots.get(name, SlotView(Probe("unknown"), utc()))

    def spark(self, name):
        view, poll = self._sparks.get(name, SparkView("unknown")), self._store.current.settings["POLL_SECONDS"]
        late = LOOK_S + 5 + 1.2 * min(60, 2 * poll) if view.failures else 2 * poll + 5      # where a part hangs the next look comes later, and takes long
        if view.state == "ok" and time.monotonic() - view.heard > late:
            return view._replace(state="stale", detail=f"has not answered since {view.seen_at}; what is shown is from then")
        return view

    def service(self, name):
        return self._services.get(name, ServiceView("unknown", "was not asked yet"))

    def facts(self, key):
        """What a vLLM told of its work; key: slot-NAME or service-NAME."""
        return getattr(self._vitals.get(key), "facts", {})

    def services(self, config):
        """The services that have a tile: configured, or built in and once seen answering; none that is disabled."""
        hidden = config.settings["DISABLED_SERVICES"]
        return {s.name: s for s in config.layout.services.values() if (s.configured or s.name in self._services) and s.name not in hidden}

    def _publish_locked(self, key, ids):
        """Tell the data path what a slot, or "service:NAME", answers to; slots come first."""
        if self.served.get(key, ()) == ids:
            return
        rest = {k: v for k, v in self.served.items() if k != key}
        self.served = dict(sorted((rest | {key: ids} if ids else rest).items(), key=lambda row: row[0].startswith("service:")))

    def observe(self, name, probe, mark=None):
        """Record what a slot answered; mark: of a poll, the slot's when it asked, so that a change is none of our swaps' doing."""
        with self._lock:
            old = self._slots.get(name)
            if old and old.probe == probe or mark and self.manager.mark(name) != mark:     # a swap began or ended meanwhile: it knows better
                return
            same = old and old.probe[:2] == probe[:2]       # but for why, which may tell an empty slot from an unknown one
            self._slots[name] = SlotView(probe, old.since if same else utc())
            self._publish_locked(name, probe.served)
        if old and old.probe.served == probe.served and {old.probe.state, probe.state} == {"serving", "wedged"}:
            wedged = probe.state == "wedged"
            said = f"is wedged: {probe.detail}" if wedged else "is not wedged any more"
            self._events.add("engine_wedged" if wedged else "engine_recovered", f"{name} ({probe.served[0]}) {said}", slot=name)
        elif mark and old and not same and old.probe.state in ("serving", "wedged"):
            now = probe.served[0] if probe.served else "nothing"
            self._events.add("model_changed" if probe.served else "model_lost", f"{name} served {old.probe.served[0]} and now {now}"
                             + (f" ({probe.detail})" if probe.detail else "") + ", without a swap", slot=name, model=now)
        self._hub.bump()

    def _rest(self, pause=lambda poll: poll, early=lambda: False):
        """Wait for the next look, or until early(); a change of POLL_SECONDS counts at once."""
        began = time.monotonic()
        while (left := began + pause(self._store.settings["POLL_SECONDS"]) - time.monotonic()) > 0 and not self._closing.wait(min(1.0, left)):
            if early():
                return

    def _look_at_slot(self, name):
        """One look at a slot, unless a swap is at it; then wait for the next."""
        config, before = self._store.current, self.manager.mark(name)
        slot = config.layout.slots.get(name)
        if slot is None:                        # gone from the file; if it comes back, so does its thread
            self._vitals.pop("slot-" + name, None)
            with self._lock:
                self._slots.pop(name, None)
                self._publish_locked(name, ())
            self._watched.discard("slot-" + name)
            return "over"
        if before[0] is None:
            endpoint = endpoint_of(slot, self._hosts, config.settings)
            probe = probe_vllm_endpoint(endpoint)
            if probe.detail == "no answer in time" and self.slot(name).probe.served:        # who reads a long prompt may be slow to say so
                probe = probe_vllm_endpoint(endpoint, 8.0)
            self._ask_vitals("slot-" + name, endpoint, probe.state == "serving")
            if probe.state == "serving" and self._is_wedged(slot, endpoint, probe):
                probe = Probe("wedged", probe.served, "requests run, no token comes, and one that was asked for did not come; "
                              "swap with restart: true starts it again")
            self.observe(name, probe, before)
        else:
            self._vitals.pop("slot-" + name, None)
        self._rest()

    def _ask_vitals(self, key, endpoint, serves):
        """Ask a vLLM's /metrics; what it does not tell is not known any more."""
        told = {}
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            told = parse_vllm_metrics(endpoint.request("GET", "/metrics")[1].decode("utf-8", "replace")) if serves else {}
        if told:
            self._vitals[key] = vitals_after(self._vitals.get(key), told, time.monotonic())
        else:
            self._vitals.pop(key, None)

    def _is_wedged(self, slot, endpoint, probe):
        """Whether requests run, no token comes, no Spark works, and a request of ours fails too; once wedged, until a token comes."""
        vitals, plan = self._vitals.get("slot-" + slot.name), self.manager.book.slots.get(slot.name)
        known = lambda view: view.state == "ok" and view.gpu and view.gpu["power_w"] is not None
        power = max(view.gpu["power_w"] if known(view) else math.inf for view in map(self.spark, (plan or slot).hosts))     # unknown proves nothing
        was, frozen, facts = self.slot(slot.name).probe.state == "wedged", vitals.frozen if vitals else 0, vitals.facts if vitals else {}
        came = facts.get("tokens_per_s") or facts.get("prompt_tokens_per_s")
        if came or not was and (frozen < WEDGE_LOOKS or power >= WEDGE_W):
            return False
        try:
            return was and frozen > 0 or do_work(endpoint, "", ENGINE_WORK({"model": probe.served[0]}), WEDGE_CANARY_S)[1] >= 500
        except (OSError, ValueError, http.client.HTTPException) as e:
            return isinstance(e, TimeoutError)              # anything else is an engine that ends: the next look tells

    def _look_at_service(self, name):
        """One look at a service; then wait for the next. A built-in one that nobody named is asked once a minute until it answers."""
        config, old = self._store.current, self._services.get(name)
        service = config.layout.services.get(name)
        hidden = service is None or name in config.settings["DISABLED_SERVICES"] or not (service.url or service.host)
        taken = {(s.hosts[0], s.port) for s in config.layout.slots.values()} | {
            (s.host, s.port) for s in config.layout.services.values() if s.configured}
        if hidden or not service.configured and (service.host, service.port) in taken:
            self._services.pop(name, None)
            self._vitals.pop("service-" + name, None)
            with self._lock:
                self._publish_locked("service:" + name, ())
            if service is None:
                self._watched.discard("service-" + name)
                return "over"
            return self._rest()
        endpoint, path = service_place(service, self._hosts, config.settings)
        state, detail, facts = probe_service(service, endpoint, path)
        self._ask_vitals("service-" + name, endpoint, service.kind == "vllm" and state == "serving")
        with self._lock:
            self._publish_locked("service:" + name, tuple(facts.get("names", ())) if not endpoint.tls and not path else ())
        if old or service.configured or state == "serving" and (facts or not KINDS[service.kind].ask):
            box = self.spark(service.host).containers.get(service.container) if service.host else None
            detail += f"; docker says of {service.container}: {box}" if box and state != "serving" else ""
            same, answered = old and old.state == state, state in ("serving", "loading")
            failures = 0 if state != "unreachable" else old.failures + 1 if old else 1
            self._services[name] = ServiceView(state, detail, {**facts, **self.facts("service-" + name)}, old.since if same else utc(),
                                               utc() if answered else old and old.seen_at, failures)
            if not same:
                self._hub.bump()
            if old and not same:
                self._events.add("service_" + state, f"{name} is {state}" + (f": {detail}" if detail else ""), service=name)
            return self._rest(lambda poll: pause_after(poll, failures))
        self._rest(lambda poll: max(60, poll))

    def _look_at_spark(self, name):
        """One look at a Spark; then wait for the next: during a swap a second, when it is dead more and more."""
        config, old, swap, first = self._store.current, self.spark(name), self._swap_at(name), name not in self._sparks
        box = self._boxes.get(name, Box(""))
        light = swap is not None and box.swap == swap and old.state == "ok"
        got = self._hosts.run(name, spark_script(light), 10 if swap else LOOK_S)
        facts = parse_spark(got.out)
        if got.kind == "ok" or got.kind == "time_out" and facts["memory"]:      # a part that hangs is not a Spark that is gone
            view = spark_view(facts, owners_of(config, name), old, light)
            sample = (time.time(), facts["memory"].get("MemAvailable"), facts["pressure"], (facts["gpu"] or {}).get("power_w"))
            if swap:
                self._boxes[name] = Box(swap, (*(box.samples if box.swap == swap else ()), sample)[-60:])
        else:
            remedy = remedy_for(got, config.sparks[name])
            view = SparkView("unreachable", why_not(got), remedy, old.seen_at, failures=old.failures + 1)
            if old.state != "unreachable" and box.samples and (box.swap == swap or time.time() - box.samples[-1][0] < 20):
                self.manager.keep_box(box.swap, name, box.public())     # of a swap that may have ended a moment before we knew
        self._sparks[name] = view
        if old.state != view.state:             # the rest is told by the thread `history`, for all at once
            self._hub.bump()
        if not first and old.state != view.state and (old.state, view.state) != ("stale", "ok"):
            self._events.add("spark_" + view.state, f"{name} is {view.state}" + (f": {view.detail}" if view.detail else ""), spark=name)
        self._hosts.address(name, again=True)   # what failed is tried here, where nobody waits for it
        self._rest(lambda poll: 1 if swap else pause_after(poll, view.failures), lambda: swap is None and self._swap_at(name))

    def _swap_at(self, name):
        """The id of the swap that is at work on a Spark, or None."""
        s = self.manager.book.running
        slot = self._store.current.layout.slots.get(s.slot) if s and not s.dry_run else None
        return s.id if slot and name in slot.hosts else None

    def _tick(self):
        """Once a poll: keep what was measured, and wake long-polls if anything changed that a person would notice."""
        self._rest()
        rows = {}
        for key, vitals in self._vitals.copy().items():
            what, _, name = key.partition("-")
            rows[what + "s", name] = tuple(vitals.facts.get(f) for f in History.ENGINE)
        for name in self._store.sparks:
            view = self.spark(name)
            gpu = view.gpu or {}
            told = (view.memory or {}).get("available_gb"), gpu.get("busy"), gpu.get("power_w"), gpu.get("temperature_c")
            rows["sparks", name] = told if view.state == "ok" else (None,) * 4
        self.history.add(time.time(), rows, {"sparks": self._store.sparks, "slots": self._store.current.layout.slots, "services": self.services(self._store.current)})
        noticed = [*(self.spark(name).noticed() for name in self._store.sparks), *(v.facts for v in self._vitals.copy().values()),
                   *((v.detail, v.facts) for v in self._services.copy().values())]
        if noticed != self._noticed:
            self._noticed = noticed
            self._hub.bump()

    def _look_at_config(self):
        self._closing.wait(1)
        if self._store.refresh():
            config = self._store.current
            self._events.add("config_changed", f"files were read again: {len(config.models)} models, {len(config.problems)} problems")
        self._watch()                           # each time: an edit may have read the files before us


# === 13 data path =============================================================
# /v1: which slot serves a request, what was asked lately, and a relay of bytes as they come, on raw sockets that block.
# Bodies and replies pass unchanged; only hop-by-hop fields and keys are taken out. Bytes are sent on as they were read:
# lines of a stream are never looked at, sizes of chunks only to know where a body ends.

PROXIED = {**{f"/v1/{name}": f"/v1/{name}" for name in (            # our path -> vLLM's, as its 0.33 lists them; no other is forwarded
    "chat/completions", "completions", "embeddings", "messages", "messages/count_tokens", "rerank", "responses", "score",
    "audio/transcriptions", "audio/translations")},
    **{f"{prefix}/{name}": f"/{name}" for name in ("tokenize", "detokenize", "pooling", "classify") for prefix in ("", "/v1")}}
UPLOADS = frozenset(("/v1/audio/transcriptions", "/v1/audio/translations"))      # forms with a file, passed on as they come
HOP_BY_HOP = ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
              "transfer-encoding", "upgrade", "content-length")
CONNECT_S, FIRST_BYTE_S, SEND_S = 3.0, 600.0, 60.0
WATCH_S = 0.1                       # for an engine that is silent for longer we wait with an eye on the client
READ = 65536                        # bytes at a time, four times as many once that much was there at once
TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
VALUE = r"[^\x00-\x08\x0a-\x1f\x7f]*"
REQUEST_LINE = re.compile(rf"({TOKEN}) ([!-~]{{1,8000}}) HTTP/1\.([01])".encode())
FIELD = re.compile(rf"({TOKEN}):({VALUE})".encode())      # blanks around the value are cut off later: here they would cost their cube
REPLY = re.compile(rf"HTTP/1\.([01]) ([2-5]\d\d)(?: {VALUE})?((?:\r\n{TOKEN}:{VALUE})*)".encode())
LENGTH = re.compile(rb"(?i)\r\ncontent-length:[ \t]*([0-9]{1,15})(?=\r\n|\Z)")
FRAMING = re.compile(rb"(?i)\r\n(content-length|transfer-encoding|connection|content-type|retry-after):[ \t]*([^\r]*)")


def dropper(names):
    """What finds the header lines of these names, each with the line end before it."""
    return re.compile(rf"(?i)\r\n(?:{'|'.join(map(re.escape, names))}):[^\r]*".encode("latin-1"))


NOT_PASSED = (*HOP_BY_HOP, "set-cookie", "x-request-id", "strict-transport-security", "content-security-policy",
              "access-control-allow-origin", "access-control-allow-credentials", "alt-svc", "clear-site-data", "refresh", "location")
DROPPED = dropper(NOT_PASSED)
NO_SPARK = "no Spark is configured: set SPARK1_HOST and start again, or try --demo"
NO_RETRY, MOST_WAIT_S = {"Retry-After": "30", "x-should-retry": "false"}, 60       # OpenAI's SDKs obey the second before all else, and wait for no longer


def place_of(config, key):
    """The Slot, or with "service:" before its name the Service, of that key; None if there is none, or it is disabled."""
    if not key.startswith("service:"):
        return config.layout.slots.get(key)
    return None if key[8:] in config.settings["DISABLED_SERVICES"] else config.layout.services.get(key[8:])


def route_model(name, config, served, swap, held):
    """Where a request for name goes -> (key in served, whether it waits there for the swap that brings the model). Pure.

    served: {slot, or "service:NAME": ids that it answers to}; swap: the one that runs, or None; held: whether its slot
    takes no requests. Raises Refused 404, or 503 for a model that is not served.
    """
    slots = config.layout.slots
    swap = None if swap is None or swap.dry_run or swap.slot not in slots else swap
    held = held and swap is not None
    if name is None and not slots:
        raise Refused(503, "no_slots", NO_SPARK, NO_RETRY)
    main = "main" if name is not None or "main" in slots else next(iter(slots))
    for key, ids in served.items():
        if (name in ids if name is not None else key == main and ids) and not (held and key == swap.slot) and place_of(config, key):
            return key, False
    wait = retry_after(swap.eta_seconds or 30, MOST_WAIT_S) if swap else NO_RETRY
    serving = sorted({ids[0] for ids in served.values() if ids})
    if name is None:
        if swap and swap.slot == main and swap.model:
            return main, True
        raise Refused(503, "nothing_served", f"slot {main} serves no model now: name another of GET /v1/models, or start one (POST /api/swap)", wait)
    if len(name) > 300:
        raise Refused(404, "model_not_found", "no model has so long a name: GET /v1/models lists them")
    if swap and name in getattr(swap.plan or config.models.get(swap.model), "served_names", ()):
        return swap.slot, True
    if held and (name in served.get(swap.slot, ()) or swap.previous and name in swap.previous.served_names):
        raise Refused(503, "model_leaving", f"{name} is being replaced by {swap.model or 'nothing'}: ask for that, or later", wait)
    if config.find(name):
        raise Refused(503, "model_not_serving", f"{name} is in the catalog and not served now, as {', '.join(serving) or 'nothing'} is: "
                      "start it (POST /api/swap), or set AUTO_SWAP", wait, serving=serving)
    raise Refused(404, "model_not_found", f"the model {printable(name, 200)} does not exist: GET /v1/models lists what is served",
                  available=sorted({i for ids in served.values() for i in ids})[:50], nearest=nearest(name, config.models))


def model_of_form(data, content_type):
    """The field `model` of a multipart form of which data is the beginning, or None if it is not among the whole parts there."""
    m = re.search(r'(?i);\s*boundary=(?:"([^"]{1,70})"|([^\s;"]{1,70}))', content_type)
    for part in data.split(b"--" + (m[1] or m[2]).encode("latin-1"))[1:-1] if m else ():
        head, _, value = part.partition(b"\r\n\r\n")
        if re.search(rb'(?i)[; ]name="?model"?\s*(?:;|\r|$)', head):
            return value.removesuffix(b"\r\n").decode("utf-8", "replace")
    return None


COUNTED = [re.compile(rb'"(?:%b)_tokens"\s*:\s*(\d{1,9})\b' % names) for names in (b"prompt|input", b"completion|output")]
BRACKETS = ("{", 1), ("[", 1), ("}", -1), ("]", -1)
VALUE_OF_KEY = re.compile(r'[ \t\r\n]*:[ \t\r\n]*("?)(null)?')


def model_of_json(body):
    """The member `model` of a JSON object, None without. Raises ValueError, RecursionError.

    Of a large body only the outline is looked at, string by string: to build all of it would take many times its size,
    and stop all streams meanwhile. Whether the rest is right the engine sees.
    """
    if len(body) <= READ:
        found = json.loads(str(body, "utf-8"))
        require(isinstance(found, dict), "not an object")
        return found.get("model")
    text, model, depth, at = str(body, "latin-1"), None, 0, 0        # a character a byte: one emoji would make all of it take four
    require(re.match(r"[ \t\r\n]*\{", text), "not an object")
    while (quote := text.find('"', at)) >= 0:
        depth += sum(text.count(c, at, quote) * by for c, by in BRACKETS)
        said, at = json.decoder.scanstring(text, quote + 1)
        if depth == 1 and said == "model" and (value := VALUE_OF_KEY.match(text, at)):         # of two the last counts, as everywhere
            start = value.end()
            model, at = json.decoder.scanstring(text, start) if value[1] else (None if value[2] else {}, start)
            model = json.loads(text[start - 1:at].encode("latin-1")) if model and not model.isascii() else model
    require(depth + sum(text.count(c, at) * by for c, by in BRACKETS) == 0, "not a whole object")
    return model


def tokens_of(tail):
    """The end of a reply or stream -> (prompt tokens, completion tokens), None where its `usage` does not tell. Pure."""
    at = tail.rfind(b'"usage"') + 7             # in text that a model wrote a backslash would stand before the second quote
    if at < 7 or not tail[at:at + 4].lstrip(b": ").startswith(b"{"):
        return None, None
    prompt, completion = [pattern.search(tail, at, at + 600) for pattern in COUNTED]
    return prompt and int(prompt[1]), completion and int(completion[1])


def shown_request(at, client, asked, status, size, seconds, key, model, where, served, first, streams, tail):
    """A row of Activity as /api/activity tells it."""
    prompt, completion = tokens_of(tail)
    spent = seconds - first if streams else seconds
    return {"time": utc(at - seconds), "id": key, "client": client, "model": printable(model, 200) or None, "served_by": where,
            "route": asked.partition(" ")[2], "status": status, "bytes": size, "first_byte_seconds": round(first, 6) or None,
            "seconds": round(seconds, 6), "prompt_tokens": prompt, "completion_tokens": completion,
            "tokens_per_second": round(completion / spent, 1) if completion and spent > 0 else None}


class Activity:
    """What was asked lately and how that went: the last 500 /v1 requests, counters for /metrics, and the log of requests.

    Whoever answers a request appends what it knows, and that is all it costs there; the thread `access` counts and
    writes the log a moment later, a few at a time, and so does whoever reads.
    """

    KEEP, AFTER_S, MOST, STEP = 500, 0.2, 20_000, 10
    BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)            # seconds
    METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE"))       # clients may make up others

    def __init__(self):
        self._new = collections.deque()                     # thread-safe by itself
        self._wake, self._closing = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._recent = collections.deque(maxlen=self.KEEP)  # guarded by _lock; newest last
        self._counts = {}                                   # guarded by _lock; (model, method and path) or (None, method) -> {what: how much}
        self._told = collections.Counter()                  # guarded by _lock; (what, which) of events -> number
        self._thread = forever("access", self._closing, self._step)
        self._thread.start()

    def close(self):
        """Count and write what is left; nothing is lost at a normal end."""
        self._closing.set()
        self._wake.set()
        self._thread.join(5)
        self.drain()

    def _step(self):
        self._wake.wait()
        self._closing.wait(self.AFTER_S)
        self._wake.clear()
        self.drain()

    def add(self, row):
        """row: Unix time of the end, client, method and path, status, bytes, seconds, id; of a request to /v1 that could be read
        also the model as asked for, the slot or service that answered or None, the model served there, seconds to the first
        byte (0: none came), whether it streamed, and the end of the reply, for its `usage`; of another that took as long as
        it was told to only None."""
        self._new.append(row)
        if not self._wake.is_set():
            self._wake.set()
        elif len(self._new) > self.MOST:
            self.drain()

    def drain(self):
        lines, second, shown = [], None, ""
        while self._new:
            with self._lock, contextlib.suppress(IndexError):           # another thread was quicker
                for _ in range(self.STEP):
                    row = self._new.popleft()
                    at, client, asked, status, size, seconds, key, *more = row
                    if int(at) != second:
                        second, shown = int(at), utc(int(at))[:-4]
                    lines.append("%s%03dZ %s %.300s %d %d B %.1f ms %s" % (shown, at % 1 * 1000, client, asked, status, size, seconds * 1000, key))
                    if len(more) > 1:
                        self._recent.append(row)
                    self._count_locked(asked, status, size, seconds, *more)
            time.sleep(0)                       # whoever waits to go on with a reply goes first
        if lines:
            with contextlib.suppress(OSError, ValueError):
                print("\n".join(lines), file=sys.stderr, flush=True)

    def _count_locked(self, asked, status, size, seconds, model="", where=None, served=None, first=0.0, streams=False, tail=b""):
        # a model that is not served counts under no name: clients may make up as many as they like
        if served is None:
            method = asked.partition(" ")[0]
            asked = method if method in self.METHODS else "other"
        if served and (served, asked) not in self._counts and len(self._counts) >= self.KEEP:
            served = "other"
        count = self._counts.get((served, asked)) or self._counts.setdefault((served, asked), collections.defaultdict(int))
        prompt, completion = tokens_of(tail)
        count[status] += 1
        count["bytes"] += size
        count["prompt"] += prompt or 0
        count["completion"] += completion or 0
        if model is not None:
            count["seconds"] += seconds
            count["seconds", bisect.bisect_left(self.BUCKETS, seconds)] += 1
        if first:
            count["first"] += first
            count["first", bisect.bisect_left(self.BUCKETS, first)] += 1

    def listen(self, event, payload):
        """A listener of Events: swaps come with their phases."""
        with self._lock:
            self._told["event", event["kind"]] += 1
            for row in (payload or {}).get("phases", ()):
                self._told["phase_sum", row["phase"]] += row["seconds"] or 0
                self._told["phase_count", row["phase"]] += 1

    def told(self, what):
        """{which: number} of what listen() counted: event, phase_sum (seconds) or phase_count."""
        with self._lock:
            return {key[1]: n for key, n in self._told.items() if key[0] == what}

    def recent(self):
        """The last requests, newest first."""
        self.drain()
        with self._lock:
            rows = list(self._recent)
        return [shown_request(*row) for row in reversed(rows)]

    def families(self):
        """(name, type, help, [(suffix, labels, number)]) of everything counted, as Prometheus wants it."""
        self.drain()
        with self._lock:
            counts = [(model, asked, dict(count)) for (model, asked), count in self._counts.items()]
        rows = sorted((({"model": model, "route": asked.partition(" ")[2]}, count) for model, asked, count in counts if model is not None), key=repr)
        others = sorted((({"method": asked}, count) for model, asked, count in counts if model is None), key=repr)
        for name, told, of in (("requests", "requests to /v1 by the model that served them", rows), ("http_requests", "all other requests", others)):
            yield f"sparkctl_{name}_total", "counter", told, [
                ("", {**labels, "status": str(what)}, n) for labels, count in of for what, n in count.items() if isinstance(what, int)]
        for what, name, told in (("bytes", "reply_bytes", "bytes of replies"), ("prompt", "prompt_tokens", "tokens of prompts, where replies told"),
                                 ("completion", "completion_tokens", "tokens that were generated, where replies told")):
            yield f"sparkctl_{name}_total", "counter", told, [("", labels, count.get(what, 0)) for labels, count in rows]
        for what, name, told, of in (("seconds", "request_seconds", "time to the end of a reply", rows), ("first", "first_byte_seconds", "time to its first byte", rows),
                                     ("seconds", "http_request_seconds", "time to answer all other requests, but for those that took as long as they were told to", others)):
            samples = []
            for labels, count in of:
                below = list(itertools.accumulate(count.get((what, i), 0) for i in range(len(self.BUCKETS) + 1)))
                samples += [("_bucket", {**labels, "le": le}, n) for le, n in zip([*map(str, self.BUCKETS), "+Inf"], below)]
                samples += [("_sum", labels, count.get(what, 0)), ("_count", labels, below[-1])]
            yield f"sparkctl_{name}", "histogram", told, samples


def bound_socket(sock, read_s, write_s):
    """Make a socket block for so long at most; that costs no system call a read, as Python's own time limit does."""
    sock.settimeout(None)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option, seconds in ((socket.SO_RCVTIMEO, read_s), (socket.SO_SNDTIMEO, write_s)):
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


TCP_ESTABLISHED, SO_MEMINFO, NONE_UNREAD = b"\x01", 55, bytes(4)        # linux: include/net/tcp_states.h, asm-generic/socket.h, sock_diag.h


def is_quiet(sock):
    """Whether a connection is open, and nothing came on it that is not read yet. Unlike recv, getsockopt keeps Python's own lock."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) == TCP_ESTABLISHED and \
        sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, 4) == NONE_UNREAD


class Pool:
    """Idle connections to engines, the one used last first. Safe to use from any thread."""

    IDLE_S = 4.0                    # uvicorn closes after 5 (uvicorn/config.py, timeout_keep_alive)

    def __init__(self):
        self._idle = {}             # (host, port) -> deque of (socket, since when), thread-safe by itself

    def take(self, endpoint):
        """(a connection, whether it was used before). Raises OSError."""
        idle, fresh = self._idle.get(endpoint[:2], ()), time.monotonic() - self.IDLE_S
        while idle:
            try:
                sock, since = idle.pop()
            except IndexError:                  # another thread was quicker
                break
            if since > fresh and is_quiet(sock):
                return sock, True
            sock.close()
        return self.connect(endpoint), False

    def connect(self, endpoint):
        """A new connection that blocks: WATCH_S at most for a read, SEND_S for a write; a host that vanished ends it."""
        sock = socket.create_connection(endpoint[:2], CONNECT_S)
        bound_socket(sock, WATCH_S, SEND_S)
        for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3)):
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock

    def put(self, endpoint, sock):
        """Give back a connection on which a reply ended as it should; those that were idle for too long go."""
        idle, now = self._idle.get(endpoint[:2]), time.monotonic()
        if idle is None:
            idle = self._idle.setdefault(endpoint[:2], collections.deque())
        idle.append((sock, now))
        try:
            while idle[0][1] < now - self.IDLE_S:
                idle.popleft()[0].close()
        except IndexError:                      # another thread was quicker
            pass


class BodyEnd:
    """Finds where a body ends while its bytes pass through: by length, by chunks, or at the connection's end."""

    SIZE = re.compile(rb"\r\n([0-9A-Fa-f]{1,8})(?:[ \t]*;[^\r\n]*)?\r\n")          # what stands between two chunks
    LAST = re.compile(rf"\r\n0+(?:[ \t]*;[^\r\n]*)?\r\n(?:{TOKEN}:{VALUE}\r\n)*\r\n".encode())
    BEGUN = re.compile(rb"\r?|\r\n[0-9A-Fa-f]{0,8}(?:[ \t]*(?:;[^\r\n]*)?\r?)?")    # a part of it
    # of a client nothing is taken that two servers may read differently: no extensions, no trailers
    STRICT = re.compile(rb"\r\n([0-9A-Fa-f]{1,8})\r\n"), re.compile(rb"\r\n0+\r\n\r\n"), re.compile(rb"\r?|\r\n[0-9A-Fa-f]{0,8}\r?")

    def __init__(self, length, chunked, strict=False, keep=False):
        self.left = 0 if chunked else length    # bytes still to come of the body or of the running chunk; None: not known
        self.chunked, self.done = chunked, length == 0 and not chunked
        self.rest = b"\r\n"                     # of what stands between chunks, as far as it came; before the first one no CR LF comes
        self.data = bytearray() if keep else None       # what the chunks hold
        self.patterns = self.STRICT if strict else (self.SIZE, self.LAST, self.BEGUN)

    def take(self, data):
        """The part of data that belongs to the body, framing included. Raises ValueError for a malformed chunk."""
        if not self.chunked:
            if self.left is not None:
                data = data[:self.left]
                self.left -= len(data)
                self.done = self.left == 0
            if self.data is not None:
                self.data += data
            return data
        size, last, begun = self.patterns
        at, count = self.left, len(data)
        if self.data is not None:
            self.data += data[:at]
        while at < count:
            known = len(self.rest)
            line, start = (self.rest + data[:8192], 0) if known else (data, at)
            m = size.match(line, start)
            if not m or m[1].strip(b"0") == b"":
                self.done = bool(m := last.match(line, start))
                if self.done:
                    self.left = 0
                    return data[:m.end() - known]
                self.rest, at = line[start:], count
                told = self.rest.find(b"\r\n", 2)       # the end of the last chunk's size, before its trailers
                fits = begun.fullmatch(self.rest) if told < 0 else self.rest[2:told].partition(b";")[0].strip(b"0 \t") == b""
                require(fits and len(self.rest) < 8192, "a malformed chunk")
                require(told < 0 or last is not self.STRICT[1] or self.rest[told:] in (b"\r\n", b"\r\n\r"), "a malformed end")
                break
            begin = m.end() - known
            at, self.rest = begin + int(m[1], 16), b""
            if self.data is not None:
                self.data += data[begin:at]
        self.left = at - count
        return data


@functools.lru_cache(256)
def parse_reply_rest(head):
    """parse_reply_head without Content-Length: many are the same within a second, so they are kept."""
    m = REPLY.fullmatch(head)
    require(m, "malformed status line or header field")
    status, fields, found = int(m[2]), m[3], {}
    for name, value in FRAMING.findall(fields):
        name, value = name.lower(), value.strip(b" \t").lower()
        require(found.setdefault(name, value) == value and name != b"content-length", "ambiguous framing")
    coding, connection = found.get(b"transfer-encoding"), found.get(b"connection", b"")
    require(coding in (None, b"chunked"), "a Transfer-Encoding that we do not know")
    lines = DROPPED.sub(b"", fields)
    if connection not in (b"", b"close", b"keep-alive"):
        lines = dropper(n.strip() for n in connection.decode("latin-1").split(",") if n.strip()).sub(b"", lines)
    return (status, lines, coding is not None and status not in (204, 304), m[1] == b"1" and b"close" not in connection,
            found.get(b"content-type", b"").startswith(b"text/event-stream"), found.get(b"retry-after", b""))


def parse_reply_head(head):
    """b'HTTP/1.1 200 OK...' without the blank line -> (length or None, status, header lines to pass on, whether it is chunked,
    whether the connection can be used again, whether it is server-sent events, Retry-After). Raises ValueError.

    As strict as parse_head: an engine must not be able to put words into our mouth.
    """
    m = LENGTH.search(head)
    rest = head[:m.start()] + head[m.end():] if m else head
    status, lines, chunked, again, streams, retry = (parse_reply_rest if len(rest) < 4096 else parse_reply_rest.__wrapped__)(rest)
    require(not (m and chunked), "ambiguous framing")
    length = 0 if status in (204, 304) else int(m[1]) if m else None
    return length, status, lines, chunked, again and (chunked or length is not None), streams, retry


def forwarded_head(request, endpoint):
    """The head for the engine up to the field that says how the body is framed. Its keys are ours to check, not to pass on."""
    named = {n.strip().lower() for k, v in request.fields if k.lower() == "connection" for n in v.split(",")}
    drop = named.union(HOP_BY_HOP, ("host", "authorization", "x-api-key", "expect", "cookie"))
    query = f"?{request.raw_query}" if "?" in request.target else ""
    lines = [f"{request.method} {PROXIED[request.path]}{query} HTTP/1.{request.minor}", f"Host: {endpoint.url[7:]}",
             *(f"{k}: {v}" for k, v in request.fields if k.lower() not in drop), *([f"Authorization: Bearer {endpoint.key}"] if endpoint.key else [])]
    return "\r\n".join([*lines, ""]).encode("latin-1")


class ClientGone(Exception):
    """The client hung up; the upstream request ends with it."""


def receive(upstream, client, limit_s, most=READ):
    """Bytes from upstream, b"" at its end. Raises ClientGone as soon as the client hangs up, TimeoutError, OSError."""
    try:
        return upstream.recv(most)              # no more than this for as long as the engine is not silent for WATCH_S
    except BlockingIOError:
        deadline = None if limit_s is None else time.monotonic() + limit_s
    poll = select.poll()
    poll.register(upstream, select.POLLIN)
    poll.register(client, select.POLLRDHUP)
    while found := poll.poll(None if deadline is None else max(0, deadline - time.monotonic()) * 1000):
        if any(fd == client.fileno() for fd, _ in found):
            raise ClientGone()
        with contextlib.suppress(BlockingIOError):
            return upstream.recv(most)
    raise TimeoutError()


def error_body(upstream, client, status, rest, end):
    """What is told of an engine's error: its own words if they are OpenAI-shaped JSON, else ours."""
    end.data, until = bytearray(), time.monotonic() + 5
    with contextlib.suppress(OSError, ValueError):
        end.take(rest)
        while not end.done and len(end.data) < 1 << 20 and (left := until - time.monotonic()) > 0 and (chunk := receive(upstream, client, left)):
            end.take(chunk)
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        if isinstance(json.loads(end.data)["error"], dict):
            return bytes(end.data)
    return to_json(Refused(status, "engine_error", "the engine answered with an error of another shape than OpenAI's: its log has the cause").body())


STATUS_LINES = {status: f"HTTP/1.1 {status} {http.client.responses.get(status, 'Reply')}".encode() for status in range(200, 600)}
BROKEN = Refused(502, "engine_failed", "the engine ended the stream before it was over: ask again, or see its log").body()


def begin(pool, endpoint, data):
    """Connect to the engine and send the beginning of a request -> (connection, bytes sent). Raises OSError."""
    upstream, reused = pool.take(endpoint)
    try:
        return upstream, upstream.send(data)
    except OSError:
        upstream.close()
        if not reused:
            raise
    upstream = pool.connect(endpoint)           # it was closed while idle: nothing was sent, so nothing can have been done
    return upstream, upstream.send(data)


def relay(client, request, pool, endpoint, head, feed, sent, close):
    """Send one request to the engine and its reply to the client as it comes -> (status, bytes, keep the client?).

    feed(upstream): passes on what of the body was not read yet; False if the engine answered before that was over.
    sent(whole): called once the engine has some of the request, and once it has the whole. Sets request.first, .streams and .tail. Raises ClientGone, and
    Refused while nothing was sent to the client.
    """
    whole, again = head + request.body if len(request.body) < READ else head, False
    try:
        upstream, count = begin(pool, endpoint, whole)
    except OSError:
        raise Refused(502, "engine_unreachable", "the engine does not answer: ask again, or see GET /api/state why") from None
    try:
        try:
            fed = False
            sent(False)                         # how long the rest takes is up to the client, and not at others' cost
            try:
                if count < len(whole) or whole is head:
                    upstream.sendall(whole[count:])
                    upstream.sendall(request.body if whole is head else b"")
                fed = feed is None or feed(upstream)
            except (BrokenPipeError, ConnectionResetError):         # it may have answered before the body was over
                pass
            request.body = whole = b""          # of those that wait long for an answer only the answer costs memory
            sent()
            got = receive(upstream, client, FIRST_BYTE_S)
            request.first = time.monotonic() - request.began
            size = len(got)
            while (at := got.find(b"\r\n\r\n")) < 0 or got.startswith(b"HTTP/1.1 1"):
                if at >= 0:
                    got = got[at + 4:]          # 100 Continue and its like
                    continue
                if request.gone():              # which receive() does not see while an engine trickles
                    raise ClientGone()
                chunk = receive(upstream, client, FIRST_BYTE_S)
                size += len(chunk)
                require(chunk and size <= READ * 2, "no reply")
                got += chunk
            length, status, lines, chunked, again, request.streams, retry = parse_reply_head(got[:at])
            rest, end = got[at + 4:], BodyEnd(length, chunked)
            if status >= 400:
                rest = error_body(upstream, client, status, rest, end)
                lines, again = b"\r\nContent-Type: application/json" + (b"\r\nRetry-After: " + retry if retry else b""), again and end.done
                length, chunked, end = len(rest), False, BodyEnd(len(rest), False)
            part = end.take(rest)
        except TimeoutError:
            raise Refused(504, "engine_timeout", f"the engine did not begin to answer within {FIRST_BYTE_S:g} s: ask for less, or see GET /api/health/deep") from None
        except (OSError, ValueError):
            raise Refused(502, "engine_failed", "the engine ended the request without an answer: ask again, or see its log") from None
        framing = b"\r\nTransfer-Encoding: chunked" if chunked else b"" if length is None or status in (204, 304) else b"\r\nContent-Length: %d" % length
        again, close = again and fed and len(part) == len(rest), close or not fed or not chunked and length is None
        size, tail, most = len(part), collections.deque((part[-4096:],), 4), READ
        try:
            client.sendall(b"".join((STATUS_LINES[status], lines, b"\r\nX-Request-Id: ", request.id.encode(), framing,
                                     b"\r\nConnection: close\r\n\r\n" if close else b"\r\n\r\n", part)))
            while not end.done:
                try:
                    part = end.take(chunk := receive(upstream, client, None, most))
                except (OSError, ValueError):
                    chunk = b""
                if not chunk:
                    break
                client.sendall(part)
                size += len(part)
                tail.append(part if len(part) < 4096 else part[-4096:])
                again = again and len(part) == len(chunk)
                most = READ * 4 if len(chunk) >= READ else most
            if not end.done and request.streams and chunked and end.left == 0 and b"\r\n".startswith(end.rest) \
                    and (b"\n\n" + b"".join(tail).removesuffix(end.rest)).endswith((b"\n\n", b"\r\r", b"\r\n\r\n")):       # between two events, or before the first
                event = b"event: error\ndata: " + to_json(BROKEN) + b"\n\n"
                client.sendall(b"%b%x\r\n%b\r\n" % (b"\r\n"[len(end.rest):], len(event), event))
        except OSError:                         # a client that left, or does not read
            raise ClientGone() from None
        finally:
            request.tail = b"".join(tail)
        again = again and end.done
        return status, size, end.done and not close
    finally:
        if again and end.done:
            pool.put(endpoint, upstream)
        else:
            upstream.close()


# === 14 http ==================================================================
# The table of routes is the API: method, path, handler, query and body fields with their parsers. Every request is
# read under limits, then guarded (Host, Origin, key), then dispatched. Handlers return (status, object[, headers])
# and never see the socket, except the two that stream.

HEAD_MAX, FIELDS_MAX, API_BODY_MAX = 32 << 10, 100, 2 << 20
TEXT = {"Content-Type": "text/plain; charset=utf-8"}
CONNECTIONS_MAX, CLIENT_MAX = 512, 448      # the second: of one address, so that another one still gets in
PARKED_MAX = 384                            # held, long-polling or streaming a log: /api always finds a thread
HEAD_S, BODY_S, IDLE_S, LINGER_S = 10.0, 60.0, 75.0, 2.0


class Request:
    """One parsed request."""

    def __init__(self, method, target, minor, fields):
        self.method, self.target, self.minor, self.fields = method, target, minor, fields   # fields: [(name, value)]
        self.path, _, self.raw_query = target.partition("?")
        self.headers = {k.lower(): v for k, v in reversed(fields)}      # of one given twice the first counts
        self.client, self.query, self.args, self.json = "", {}, {}, {}
        self.gone = lambda: False       # whether the client has hung up
        self.forwarded = None, "", None, b""    # (Config, where, its Endpoint, forwarded_head for it)
        self.renew()

    IDS, COUNT = secrets.token_hex(4), itertools.count(1)

    def renew(self):
        """The next request with the very same head."""
        self.id, self.body, self.began = f"{self.IDS}{next(self.COUNT):08x}", b"", time.monotonic()
        self.model = self.where = None          # of a /v1 request: the model as asked for, and where it went
        self.first, self.streams, self.tail = 0.0, False, b""           # what relay() saw
        return self

    @functools.cached_property
    def close(self):
        asked = ",".join(v for k, v in self.fields if k.lower() == "connection").lower()
        return "close" in asked or self.minor == 0 and "keep-alive" not in asked


def parse_head(head):
    """Bytes up to the blank line -> (Request, body length, -1 for chunked). Raises Refused 400.

    Stricter than needed where laxness lets two servers disagree about where a request ends: no bare CR or LF, no
    folded lines, no second Content-Length, no Content-Length beside Transfer-Encoding.
    """
    lines = head.split(b"\r\n")
    m = REQUEST_LINE.fullmatch(lines[0])
    if len(lines) > FIELDS_MAX:
        raise Refused(431, "too_many_headers", f"more than {FIELDS_MAX} header fields: send fewer")
    found = [FIELD.fullmatch(line) for line in lines[1:]]
    if not m or not m[2].startswith(b"/") or b"#" in m[2] or re.search(rb"(?<!\r)\n|\r(?!\n)", head) or not all(found):
        raise Refused(400, "bad_request", f"malformed {'header field' if m and not all(found) else 'request line or header'}: see what the client sends")
    request = Request(m[1].decode(), m[2].decode(), int(m[3]), [(f[1].decode(), f[2].strip(b" \t").decode("latin-1")) for f in found])
    count = collections.Counter(k.lower() for k, _ in request.fields)
    length, coding = request.headers.get("content-length", "0"), request.headers.get("transfer-encoding")
    if max(count["content-length"] + count["transfer-encoding"], count["host"]) > 1 or not re.fullmatch(r"\d{1,15}", length, re.ASCII) \
            or coding is not None and (coding.lower() != "chunked" or request.minor == 0):
        raise Refused(400, "bad_request", "its framing or Host is ambiguous: send one Content-Length, or Transfer-Encoding: chunked, and one Host")
    return request, -1 if coding else int(length)


def host_allowed(host, allowed):
    """Whether a Host header names us: an IP literal, localhost, this machine, *.local, or a configured name.

    Against DNS rebinding: a hostile page's own name may resolve to us, but it is none of these.
    """
    name = re.sub(r":\d+$", "", host.strip().lower())
    name = name[1:-1] if re.fullmatch(r"\[[0-9a-f:.]+\]", name) else name
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    own = socket.gethostname().lower()
    known = ("localhost", own, own.partition(".")[0], *(a.lower() for a in allowed))
    return name in known or bool(re.fullmatch(r"[a-z0-9-]+\.local", name))


def guard(request, settings, is_open):
    """Who may speak: raises Refused 421, 403 or 401. is_open: needs no key."""
    if not host_allowed(request.headers.get("host", "localhost" if request.minor == 0 else ""), settings["SPARKCTL_ALLOWED_HOSTS"]):
        raise Refused(421, "host_refused", "this Host name is not ours: add it to SPARKCTL_ALLOWED_HOSTS, or use the IP address")
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    writes = request.method not in ("GET", "HEAD", "OPTIONS")
    strange = origin is not None and origin.partition("://")[2].lower() != request.headers.get("host", "").lower()
    if site == "cross-site" and not is_open or writes and (strange or site not in (None, "same-origin", "none")):       # some that only read cost the Sparks something
        raise Refused(403, "origin_refused", "a page of another origin may not do this: use sparkctl's own page, or no browser")
    key = settings["SPARKCTL_API_KEY"]
    if key and not is_open:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode("latin-1", "replace"), key.encode()):
            raise Refused(401, "key_refused" if given else "key_missing", "send the API key as `Authorization: Bearer KEY`",
                          {"WWW-Authenticate": "Bearer"})


def parse_json(body):
    """Bytes -> a JSON object. Raises Refused 400 that says what is wrong."""
    def no_duplicates(pairs):
        for key, count in collections.Counter(k for k, _ in pairs).items():
            require(count == 1, f"the key {key!r} is given twice")
        return dict(pairs)

    constant = lambda name: require(False, f"{name} is not JSON")
    try:
        got = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=constant) if (text := str(body, "utf-8")).strip() else {}
    except (ValueError, RecursionError) as e:
        known = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}
        raise Refused(400, "bad_json", f"the body must be a JSON object in UTF-8, and is {known.get(type(e), f'not JSON: {printable(str(e), 200)}')}") from None
    if not isinstance(got, dict):
        raise Refused(400, "bad_json", "the body must be a JSON object, as in {\"model\": \"KEY\"}")
    return got


def pick_slot(config, name):
    slots = config.layout.slots
    if not slots:
        raise Refused(409, "no_slots", NO_SPARK)
    if name is None:
        return slots.get("main") or next(iter(slots.values()))
    return entry_of(slots, "slot", name, known=list(slots))


def fitting(model, slot):
    """Both, if the slot has as many Sparks as the model needs. Raises Refused 409."""
    if model.mode == "cluster" and len(slot.hosts) < 2:
        raise Refused(409, "needs_cluster", f"{model.key} is a cluster model, and slot {slot.name} has one Spark: name another slot, or give it more hosts", slot=slot.name)
    return slot, model


SWAP_STATUS = {"ready": 200, "planned": 200, "failed": 502, "cancelled": 409}
# What a job does: f(app, job, tell, id of a swap that it began before a restart) -> what came of it. Raises Refused.


def swap_outcome(app, swap_id):
    """Wait for the end of a swap, and of its rollback -> what came of it. Raises Refused if it failed."""
    app.poll(None, lambda: app.ended(swap_id), math.inf)
    swap = app.swaps.get(swap_id)
    if swap.phase != "ready":
        raise Refused(502, "swap_failed", f"{swap.phase}: {swap.error['message'] if swap.error else 'cancelled by someone'}")
    return f"{swap.model} serves"


def job_locked(action):
    """A job that does action(app, job, tell, token) while it holds the lock; what disturbs others is done like that only."""
    def run(app, job, tell, swap_id):
        if swap_id:                             # its lock came through the restart too, and ends with the swap
            return swap_outcome(app, swap_id)
        deadline = time.monotonic() + job.get("wait", 600)

        def gone():
            now = app.jobs.register.entries.get(job["id"], {"enabled": False})
            return now.get("enabled") is False or any(now.get(k) != job.get(k) for k in ("kind", "model", "slot", "service"))
        while True:
            wish = {"holder": f"job {job['id']}", "ttl": 900, "note": job.get("note", "")}
            wish["wait"] = max(0, deadline - time.monotonic())
            tell(detail="waits for the lock")
            lease = app.take_lock(None, wish, until=gone, swap="asked", told=False)     # or Answered, if it is gone
            try:
                if gone():
                    raise Refused(409, "job_gone", "it was deleted or changed meanwhile")
                return action(app, job, tell, app.swaps.token(lease))
            except Refused as e:                # for what only takes time others need not wait
                busy, left = e.code == "swap_running", deadline - time.monotonic()
                if e.code not in ("swap_running", "serving_too_short") or left <= 0:
                    raise
                pause = left if busy else min(left, e.details["eta_seconds"])
                tell(detail=printable(f"waits: {e}", 500))
            finally:
                if not app.closing.is_set():
                    app.swaps.end_lease(lease.fence, "its work is done")
            app.poll(None, lambda: busy and not app.swaps.book.running or gone(), pause)
    return run


def job_swap(app, job, tell, token):
    config = app.store.current
    slot, key = pick_slot(config, job.get("slot")), entry_of(config.models, "model", job.get("model", "")).key
    options = {"client": f"job {job['id']}", "automatic": True, "note": job.get("note", ""), "token": token}
    _, got, _ = app.swap(None, slot, key, options, wait_s=0)
    if "already_serving" in got:
        return f"{key} was served already"
    tell(swap=got["id"])
    return swap_outcome(app, got["id"])


def job_health(app, job, tell, swap_id):
    rows = app.health()["services"]
    if bad := [f"{row['name']}: {row['detail']}" for row in rows if not row["ok"]]:
        raise Refused(502, "unhealthy", "; ".join(bad))
    return f"{len(rows)} answered"


JOB_ACTIONS = {"swap": job_locked(job_swap), "health": job_health,
               "warm": job_locked(lambda app, job, tell, token: app.warm(job.get("model", ""))),
               "restart": job_locked(lambda app, job, tell, token: app.restart(job.get("service", ""), f"job {job['id']}", token))}


def exposure(bind, key, root, allow_root=True):
    """What is unwise about who may reach us -> (sentences, whether the first is a refusal)."""
    loopback = bind in ("localhost", "::1") or bind.startswith("127.")
    refused = root and not loopback and not allow_root
    told = ["root on a non-loopback address is refused; use another user, or --allow-root" if refused else
            "sparkctl runs as root and needs no root: run it as a user that may ssh to the Sparks"] if root else []
    if not loopback and not key:
        told.append(f"anybody who reaches {bind} may swap, add and change models: set SPARKCTL_API_KEY")
    return told, refused


def ask_all(what, asks):
    """[(facts, ask)]: every ask(), which limits its own time, at once -> {ok, what: [{facts, ok, seconds, detail}]}."""
    def answer(facts, ask):
        began, ok, more = time.monotonic(), False, {}
        try:
            detail, ok = ask() or "answers", True
        except Refused as e:
            detail, more = str(e), {k: v for k, v in e.details.items() if v}
        return {**facts, "ok": ok, "seconds": round(time.monotonic() - began, 3), "detail": detail, **more}
    with ThreadPoolExecutor(max(1, len(asks))) as pool:
        rows = list(pool.map(answer, *zip(*asks))) if asks else []
    return {"ok": all(row["ok"] for row in rows), what: rows}


class App:
    """What the handlers work on. Fixed after construction; each part keeps its own locks."""

    def __init__(self, store, data_dir, demo=False):
        self.store, self.demo, self.warnings = store, demo, []
        self.hub, self.gate, self.pool, self.activity = Hub(), Gate(), Pool(), Activity()
        self.events = Events(os.path.join(data_dir, "events.jsonl"), self.hub)
        self.hosts = Hosts(store.sparks.values())
        self.monitor = Monitor(store, self.hosts, self.hub, self.events)
        self.swaps = SwapManager(data_dir, lambda: store.current, self.hosts, self.hub, self.gate, self.events.add,
                                 self.warnings.append, self.monitor.observe)
        self.monitor.manager = self.swaps
        self.webhooks = Webhooks(lambda: store.current.settings, self.hub)
        self.events.listeners += [self.webhooks.tell, self.activity.listen]
        jobs, schedules, transfers = (Register(os.path.join(data_dir, f"{what}s.json"), what, fields, required, self.hub, self.warnings.append)
                                      for what, fields, *required in (("job", JOB | JOB_STATE, "kind", "cron", "due", "runs"),
                                                                      ("schedule", SCHEDULE, "registered_at"),
                                                                      ("transfer", TRANSFER, *TRANSFER_NEEDS)))
        self.jobs = Jobs(jobs, {kind: functools.partial(run, self) for kind, run in JOB_ACTIONS.items()}, self.events.add)
        self.schedules = Schedules(schedules, jobs)
        self.transfers = Transfers(transfers, lambda: store.current, self.hosts, self.hub, self.events.add)
        self.swaps.deleting = self.transfers.deleting
        self.closing = self.hub.closing
        self._parked = threading.BoundedSemaphore(PARKED_MAX)
        for warning in self.warnings:           # what was lost is not only shown until the next start
            self.events.add("state_lost", warning)

    def start(self):
        values = {row["name"]: row["value"] for row in self.store.settings.public() if row["source"] != "default"}
        starts = (e.get("settings") for e in self.events.since(0) if e["kind"] == "started")
        before = next((given for given in starts if isinstance(given, dict)), values)
        if changed := sorted(k for k in values.keys() | before.keys() if values.get(k) != before.get(k)):
            said = ", ".join(f"{k} = {setting_text(values.get(k, 'default'))}" for k in changed)
            self.events.add("settings_changed", f"since the last start: {said}", names=changed)
        self.events.add("started", f"sparkctl {VERSION} was started", settings=values)
        self.swaps.begin()
        self.monitor.start()
        self.jobs.start()
        self.transfers.start()

    def close(self):
        self.jobs.close()
        self.closing.set()
        self.hub.bump()                         # parked long-polls answer now
        self.swaps.close()
        self.events.add("stopped", "sparkctl was told to end")
        self.hosts.close()

    # --- what is shown

    def slots(self, config):
        running = self.swaps.book.running
        for slot in config.layout.slots.values():
            view, (in_flight, held) = self.monitor.slot(slot.name), self.gate.counts(slot.name)
            served = view.probe.served[0] if view.probe.served else None
            model = config.find(served) if served else None
            state = {"serving": "serving", "silent": "empty", "loading": "wedged", "wedged": "wedged"}.get(view.probe.state, "unknown")
            if state == "empty" and (view.probe.detail not in EMPTY or self.monitor.spark(slot.hosts[0]).state == "unreachable"):
                state = "unknown"
            if running and running.slot == slot.name and running.holds:
                state = "swapping"
            yield {"name": slot.name, "state": state, "model": model.key if model else None, "served_id": served, "since": view.since,
                   "url": endpoint_of(slot, self.hosts, config.settings).url, "hosts": list(slot.hosts), "port": slot.port,
                   "backend": slot.backend, "detail": view.probe.detail, "in_flight": in_flight, "held": held,
                   "facts": self.monitor.facts("slot-" + slot.name)}

    def models(self, config, hidden=False):
        on = {s["model"]: s["name"] for s in self.slots(config) if s["model"]}
        return [{**m.public(), "serving_on": on.get(m.key)} for m in (config.models | (config.hidden if hidden else {})).values()]

    def model(self, config, key):
        """A model as GET shows it, a hidden one too. Raises Refused 404."""
        return entry_of({m["key"]: m for m in self.models(config, hidden=True)}, "model", key)

    def in_use(self, key):
        """Whether a model is served or being loaded, or a rollback to it may come."""
        book = self.swaps.book
        swaps = [s for s in (book.running, book.waiting) if s]
        plans = [plan.model for plan in (*book.slots.values(), *(s.previous for s in swaps)) if plan]
        return key in (*plans, *(k for s in swaps for k in (s.model, s.from_model)), *(s["model"] for s in self.slots(self.store.current)))

    def command(self, config, key):
        """The command line that a swap to the model would run, secrets masked, or why there is none."""
        model = (config.models | config.hidden)[key]
        try:
            slot = config.layout.slots.get(self.model(config, key)["serving_on"]) or pick_slot(config, None)
            require(not model.hidden, "it is hidden")
            require(model.mode == "solo" or len(slot.hosts) > 1, f"it is a cluster model, and slot {slot.name} has one Spark")
            return make_plan(model, slot, config).shown
        except (Refused, ValueError) as e:
            return f"cannot be launched: {e}"

    def edit_models(self, r, key, said, change):
        """ConfigStore.edit of the overrides file, told as an event if it changed something."""
        before, after = self.store.edit("overrides", change)
        if after is not before:
            self.events.add("catalog_changed", f"{r.client} {said} {key}", client=r.client, model=key)
        return before, after

    def tiles(self, config):
        return [{"name": s.name, "kind": s.kind, "label": s.label, "host": s.host, "port": s.port, "url": s.url, "container": s.container,
                 **self.monitor.service(s.name)._asdict()} for s in self.monitor.services(config).values()]

    def exposed(self):
        return [] if self.demo else exposure(self.store.started["SPARKCTL_BIND"], self.store.settings["SPARKCTL_API_KEY"], os.geteuid() == 0)[0]

    def state(self):
        config, version = self.store.current, self.hub.version()
        running, recent = self.swaps.book.running, self.swaps.recent
        schedules, conflicts = self.schedules.view()
        return {"version": version, "now": utc(), "demo": self.demo,
                "warnings": [*config.settings.warnings, *map(str, config.problems), *self.exposed(), *self.warnings],
                "sparks": [{"name": s.name, "host": s.host, **self.monitor.spark(s.name).public()} for s in config.sparks.values()],
                "slots": list(self.slots(config)), "models": self.models(config),
                "services": self.tiles(config),
                "swap": running and running.public(), "last": next((s.public() for s in recent if not s.dry_run), None),
                "lock": self.swaps.lock_info(), "schedules": schedules, "conflicts": conflicts, "jobs": self.jobs.shown(),
                "transfers": list(self.transfers.shown(self.transfers.running())), "failed_transfers": list(self.transfers.shown(self.transfers.failed())),
                "events": self.events.since(0, 50), "settings": config.settings.public()}

    def parking(self):
        """A context around whatever keeps a connection waiting. Raises Refused 503 if too many do."""
        if not self._parked.acquire(blocking=False):
            raise Refused(503, "too_many_waiting", f"{PARKED_MAX} requests wait already: ask again in some seconds", {"Retry-After": "5"})
        parked = contextlib.ExitStack()
        parked.callback(self._parked.release)
        return parked

    def poll(self, r, predicate, wait_s):
        """Park until predicate() or wait_s is over or we stop. Raises ClientGone if the client of r (None: a job) hangs up meanwhile."""
        deadline = time.monotonic() + wait_s
        if wait_s <= 0 or predicate():
            return
        with self.parking() if r else contextlib.nullcontext():
            while not self.hub.wait_for(lambda: predicate() or self.closing.is_set(), max(0.0, min(1.0, deadline - time.monotonic()))):
                if r and r.gone():
                    raise ClientGone()
                if time.monotonic() >= deadline:
                    return

    # --- the data path

    def endpoint(self, where):
        """Where the slot or service of that key answers. Raises Refused 503 if it is gone."""
        config, place = self.store.current, place_of(self.store.current, where)
        if isinstance(place, Slot):
            return endpoint_of(place, self.hosts, config.settings)
        if place is None:
            raise Refused(503, "nothing_served", "it was taken out of services-overrides.yaml a moment ago: ask again", {"Retry-After": "30"})
        return service_place(place, self.hosts, config.settings)[0]

    def admit(self, r, name):
        """Count a /v1 request in where the model of that name is served -> (key of monitor.served, its ticket or None).

        While a swap brings the model it waits in line, for HOLD_SECONDS at most; with AUTO_SWAP it may begin that swap.
        The ticket is to be stepped out with once the request is on its way. Raises Refused 404, 503; ClientGone.
        """
        gate, ticket, line, joined, parked = self.gate, None, None, None, None
        try:
            while True:
                config, served, swap = self.store.current, self.monitor.served, self.swaps.book.running
                try:
                    where, waits = route_model(name, config, served, swap, swap is not None and gate.is_held(swap.slot))
                    joined = swap.id if waits else joined
                except Refused as e:
                    (where, joined), waits = self.bring(r, name, config, joined, e), True
                if not waits and gate.enter(where, ticket):
                    if self.monitor.served is served:
                        if ticket and line != where:
                            gate.step_out(line, ticket)
                        return where, ticket if line == where else None
                    gate.leave(where)           # a swap came between: look again
                    continue
                if not parked:
                    parked, until = self.parking(), time.monotonic() + config.settings["HOLD_SECONDS"]
                left, eta = until - time.monotonic(), swap.eta_seconds if swap and swap.slot == where else None
                if left <= 0 or (eta or 0) > left:
                    raise Refused(503, "swapping", f"slot {where} is loading {'the' if joined else 'another'} model, which takes longer than "
                                  f"HOLD_SECONDS: ask again in {eta or 10:.0f} s", retry_after(eta or 10, MOST_WAIT_S), eta_seconds=eta)
                if ticket is None or line != where or waits and ticket.is_set():        # to the end of the line
                    if ticket:
                        gate.step_out(line, ticket)
                    ticket, line = gate.queue(where, waits), where
                ticket.wait(min(0.5, left))
                if r.gone():
                    raise ClientGone()
        except BaseException:
            if ticket:
                gate.step_out(line, ticket)
            raise
        finally:
            if parked:
                parked.close()

    def bring(self, r, name, config, joined, refusal):
        """What AUTO_SWAP does for a model that is not served: begin its swap, once -> (slot, that swap's id).

        The id is None while another swap runs, whose end is waited for. joined: the swap that this request waited for
        so far. Raises refusal, or Refused 503: lock, breaker and MIN_SERVING_SECONDS count as for a job.
        """
        old, model = joined and self.swaps.get(joined), config.find(name) if name else None
        if refusal.code == "model_not_serving" and old and old.phase in ("failed", "cancelled"):
            why = f": {old.error['message']}" if old.error else ""
            raise Refused(503, "swap_failed", f"the swap to {old.model} ended {old.phase}{why}; ask an operator", NO_RETRY, swap=old.id)
        slots = sorted(config.layout.slots.values(), key=lambda slot: slot.name != "main")
        slot = next((s for s in slots if model and (model.mode != "cluster" or len(s.hosts) > 1)), None)
        if refusal.code != "model_not_serving" or not config.settings["AUTO_SWAP"] or not slot:
            raise refusal
        running = self.swaps.book.running
        if running and not running.dry_run:     # a rollback too: only people may take its place
            return slot.name, None
        try:
            return slot.name, self.swaps.start(slot.name, model.key, automatic=True, client=r.client, note="a /v1 request asked for it",
                                               rollback=config.settings["SWAP_ROLLBACK"]).id
        except Refused as e:
            if e.code == "swap_running":
                return slot.name, None
            raise Refused(503, e.code, f"AUTO_SWAP may not bring {model.key} now: {e}", {"Retry-After": e.headers.get("Retry-After", "30")}, **e.details) from None

    # --- who may, and what they then do; r is None for a job

    def take_lock(self, r, wish, token="", until=lambda: False, **more):
        """The lease that wish, {holder, ttl, wait, note}, asks for, after standing in the queue. Raises Refused, ClientGone."""
        needed(wish, *([] if token else ["holder"]))
        wait_s, client = wish.get("wait", 0), r.client if r else ""
        ticket = self.swaps.acquire(wish.get("holder", ""), wish.get("ttl", 900), token, wait_s > 0, wish.get("note", ""), client, **more)
        try:
            if not ticket.lease:
                self.poll(r, lambda: ticket.lease or until(), wait_s)
            if r and r.gone():
                raise ClientGone()
        except BaseException:
            self.swaps.leave(ticket, drop=True)
            raise
        if refusal := self.swaps.leave(ticket) if not ticket.lease else None:
            stopping = Refused(503, "stopping", "sparkctl ends; ask again in a moment", {"Retry-After": "5"})
            raise Answered() if until() else stopping if self.closing.is_set() else refusal
        return ticket.lease

    def put_entry(self, r, what, place):
        """Add or replace what r describes in place: the schedules or the jobs -> (status, how it is shown)."""
        needed(r.json, "id")
        status = 200 if r.json["id"] in place.register.entries else 201
        place.put(r.json)
        self.events.add(what + "_set", f"{r.client} set {what} {r.json['id']}", client=r.client, id=r.json["id"])
        return status, next((row for row in place.shown() if row["id"] == r.json["id"]), r.json)

    def drop_entry(self, r, what, place):
        place.register.change(r.args["id"], lambda old: None)
        self.events.add(what + "_removed", f"{r.client} removed {what} {r.args['id']}", client=r.client, id=r.args["id"])
        return 200, {"deleted": r.args["id"]}

    def lock_reply(self, lease):
        """What the holder alone is told."""
        return {"token": self.swaps.token(lease), **{k: v for k, v in lease.public().items() if k not in ("locked", "queue")}}

    def serves(self, slot):
        """Names that the slot's engine answers to at this very moment."""
        probe = probe_vllm_endpoint(endpoint_of(slot, self.hosts, self.store.settings))
        return probe.served if probe.state == "serving" else ()

    def swap(self, r, slot, key, options, wait_s=None, lock=None, idempotency=None):
        """A swap as asked for over HTTP or by a job, with the lock around it if wanted -> (status, body, headers).

        With lock: stand in the queue, wait for a swap that runs, swap, tell the token. If it fails, the lease ends.
        """
        config, fence, replay = self.store.current, 0, lambda: self.swaps.answer_to(idempotency)
        fitting(config.models[key], slot)
        options = {"rollback": config.settings["SWAP_ROLLBACK"], **options}
        try:
            if replay():
                raise Answered()
            deadline = time.monotonic() + (lock or {}).get("wait", 0)
            if lock is not None:
                lease = self.take_lock(r, lock, options.get("token", ""), replay, swap="asked", told=bool(idempotency))
                fence, options["token"] = lease.fence, self.swaps.token(lease)
            while True:
                if not options.get("restart") and not options.get("dry_run") and not self.swaps.book.running and key in self.serves(slot):
                    if wait_s is None and lock is None:
                        raise Refused(409, "already_serving", f"{slot.name} serves {key} already; send restart: true to load it again",
                                      model=key, slot=slot.name)
                    self.swaps.remember(idempotency, slot.name, key, options.get("token", ""), options.get("force", False))
                    return self.served_reply(slot.name, key, fence)
                try:
                    swap = self.swaps.start(slot.name, key, key=idempotency, **options)
                    break
                except Refused as e:            # the lock is ours: what runs comes to its end, and nothing else begins
                    if e.code != "swap_running" or lock is None or time.monotonic() >= deadline or self.closing.is_set():
                        raise
                    self.poll(r, lambda: not self.swaps.book.running, deadline - time.monotonic())
            status, body, headers = self.swap_reply(r, swap, wait_s, fence)
            if fence and "lock" not in body and body["phase"] not in ("failed", "cancelled"):
                raise Refused(409, "lock_lost", f"the lock was ended by force, and swap {swap.id} is {body['phase']}: see what serves, and take the lock again", swap=swap.id)
            return status, body, headers
        except BaseException as e:
            if fence:                           # it did not begin, or nobody is there to be told
                self.swaps.answered(fence, gone=True)
            if not isinstance(e, Answered):
                raise
            found = replay()
            return self.swap_reply(r, self.swaps.get(found["swap"]), wait_s, found["fence"]) if found["swap"] else \
                self.served_reply(found["slot"], found["model"], found["fence"])

    def lock_part(self, fence):
        lease = self.swaps.answered(fence) if fence else None
        return {"lock": self.lock_reply(lease)} if lease else {}

    def served_reply(self, slot, key, fence):
        last = next((s.public() for s in self.swaps.recent if s.phase == "ready" and s.model == key and s.slot == slot), {})
        return 200, {**last, "model": key, "slot": slot, "phase": "ready", "already_serving": True, **self.lock_part(fence)}, {}

    def swap_reply(self, r, swap, wait_s, fence=0):
        """202 at once, or the end of the swap for whoever waits: 200, 502, 409, or 504 while it still runs.

        fence: of the lease that was taken together with it; then its end is that of its rollback too.
        """
        location = {"Location": f"/api/swap/{swap.id}"}
        if wait_s is None:
            return 202, {**swap.public(), **self.lock_part(fence)}, location
        with contextlib.suppress(Refused):      # too many wait already: then 504 tells that it runs
            self.poll(r, lambda: self.ended(swap.id) if fence else self.swaps.get(swap.id).phase in TERMINAL, wait_s)
        if r and r.gone():
            raise ClientGone()
        swap = self.swaps.get(swap.id)
        status = 409 if swap.phase == "planned" and swap.error else SWAP_STATUS.get(swap.phase, 504)
        return status, {**swap.public(), **({"still_running": True} if status == 504 else {}), **self.lock_part(fence)}, location

    def ended(self, swap_id):
        """Whether a swap is over, and its rollback too."""
        s = self.swaps.get(swap_id)
        return s.phase in TERMINAL and not (s.rollback_id and self.swaps.get(s.rollback_id).phase not in TERMINAL)

    def on_spark(self, spark, code, what, script, timeout_s, cancel=None, send=None):
        """Run a script on a Spark for a client. Raises Refused 502 or 504 that tells why what was asked for failed, and what to do."""
        listens = True

        def take(pipe, line):
            nonlocal listens
            try:
                if listens and (pipe == "out" or not line):     # an empty line of err is a beat: it is at it
                    send(printable(line).encode() + b"\n" if pipe == "out" else b"")
            except OSError:                     # the client left, or reads nothing: cancel knows whether that matters
                listens = False
        got = self.hosts.run(spark, script, timeout_s, cancel, send and take)
        if got.kind != "ok":
            raise Refused(504 if got.kind == "time_out" else 502, code, f"{what}{why_not(got)}", remedy=remedy_for(got, spark))

    def contained(self, config, name):
        """The service of that name, which runs in a container. Raises Refused 404, 409."""
        service = entry_of(self.monitor.services(config), "service", name)
        if not service.container or not service.host:
            raise Refused(409, "no_container", f"{name} has no restart and no logs: give it host and container in services-overrides.yaml")
        return service

    def restart(self, name, client, token="", force=False, send=None):
        """Restart a service's container under the lock -> what was done; send gets what is said. Raises Refused 404, 409, 423, 502, 504."""
        config = self.store.current
        service = self.contained(config, name)
        places = [*config.layout.slots.items(), *self.swaps.book.slots.items()]
        engines = {(host, place.container): slot for slot, place in places for host in place.hosts}
        if slot := engines.get((service.host, service.container)):
            raise Refused(409, "slot_engine", f"{name} is the engine of slot {slot}: POST /api/swap with \"restart\": true instead")
        spark, c = self.spark_of(config, service), quote_arg(service.container)
        script = f"t=$(date +%s); docker restart -t 30 {c} || exit 1\n" + (f"timeout 5 docker logs -f --since \"$t\" {c} 2>&1; exit 0" if send else "")
        first = iter((f"-- docker restarts container {service.container} on {service.host}\n".encode(),))        # goes with what docker says: before that it may still be refused
        with self.swaps.holding(token, force, f"the restart of {name}", client):
            self.events.add("service_restart", f"{client} restarts {name}", service=name, client=client)
            self.on_spark(spark, "restart_failed", f"{name} on {service.host}: ", script, 125, send=send and (lambda data: send(next(first, b"") + data)))
        return f"container {service.container} on {service.host} was restarted"

    def warm(self, key, slot=None, limit_s=None):
        """One tiny request to a served model -> how it answered. Raises Refused 409, 502."""
        settings = self.store.settings
        slot = slot or next((slot for slot in self.store.current.layout.slots.values() if key in self.serves(slot)), None)
        if slot is None:
            raise Refused(409, "model_not_serving", f"{key} is not served now: start it (POST /api/swap)")
        began = time.monotonic()
        ask_for_work("vllm", endpoint_of(slot, self.hosts, settings), "", {"model": key}, limit_s or settings["SWAP_WARM_TIMEOUT"])
        return f"{key} answered in {time.monotonic() - began:.2f} s"

    def health(self):
        """Every slot's model is asked for a token and every service for its work, all at once -> {ok, services}."""
        config = self.store.current

        def of_slot(slot):
            probe, ours = probe_vllm_endpoint(endpoint_of(slot, self.hosts, config.settings)), self.swaps.book.slots.get(slot.name)
            if probe.state == "serving":
                return self.warm(probe.served[0], slot, 30)
            if probe.detail in EMPTY and not ours and not self.gate.is_held(slot.name):
                return "nothing is served, and nothing should be"
            raise Refused(502, "unhealthy", "a swap is under way" if self.gate.is_held(slot.name) else f"{ours.model if ours else 'the engine'}: {probe.detail}")

        asks = [({"name": slot.name, "kind": "slot"}, functools.partial(of_slot, slot)) for slot in config.layout.slots.values()]
        asks += [({"name": s.name, "kind": s.kind}, functools.partial(
            ask_for_work, s.kind, *service_place(s, self.hosts, config.settings), self.monitor.service(s.name).facts, 30, s.health))
            for s in self.monitor.services(config).values()]
        return ask_all("services", asks)

    def connectivity(self):
        """Every Spark's ssh and every port that slots and services answer on, all at once -> {ok, places}."""
        config = self.store.current
        services = self.monitor.services(config).values()

        def connect(endpoint, may_be_closed=False):
            try:
                socket.create_connection((endpoint.host, endpoint.port), 5).close()
            except OSError as e:
                if not (may_be_closed and isinstance(e, ConnectionRefusedError)):
                    raise Refused(502, "unreachable", why_silent(e)[1]) from None
                return "connection refused, as it should be: the slot is empty"
            return "connected"
        logins = {*config.sparks.values()} | {self.spark_of(config, s) for s in services if s.host}
        asks = [({"name": s.name, "kind": "ssh", "host": s.host, "user": s.user}, functools.partial(self.on_spark, s, "unreachable", "", "exit 0", 10))
                for s in sorted(logins, key=repr)]
        for name, kind, place in ([(s.name, "slot", endpoint_of(s, self.hosts, config.settings)) for s in config.layout.slots.values()]
                                  + [(s.name, s.kind, service_place(s, self.hosts, config.settings)[0]) for s in services]):
            row = {"name": name, "kind": kind, "host": place.host, "port": place.port}
            asks.append((row, functools.partial(connect, place, kind == "slot" and name not in self.swaps.book.slots)))
        return ask_all("places", asks)

    def endpoints(self, r):
        """Addresses for applications that work from the client's machine: a Spark that is this machine goes by the client's name for it."""
        config, asked = self.store.current, r.headers.get("host") or socket.gethostname()
        here, hidden = re.sub(r":\d+$", "", asked).strip("[]"), config.settings["DISABLED_SERVICES"]

        def base(service):
            place, path = service_place(service, self.hosts, config.settings)
            near = re.fullmatch(r"127\.[\d.]+|::1|localhost", place.host)
            return service.url or place._replace(host=here if near else place.host).url + path
        tiles = self.monitor.services(config)
        rows = [{"name": s.name, "kind": s.kind, "label": s.label, "disabled": s.name in hidden,
                 "state": "disabled" if s.name in hidden else self.monitor.service(s.name).state, "base_url": base(s),
                 "openai_base_url": base(s) + KINDS[s.kind].base if KINDS[s.kind].base else None}
                for s in config.layout.services.values() if (s.name in tiles or s.name in hidden) and (s.url or s.host)]
        own = f"http://{asked}/v1"
        return {"base_url": own, "needs_key": bool(config.settings["SPARKCTL_API_KEY"]), "services": rows, "slots": [
            {"base_url": own, **{k: slot[k] for k in ("name", "state", "model", "served_id")}} for slot in self.slots(config)]}

    def families(self):
        """What /metrics tells: (name, type, help, samples) each; a value of None is left out."""
        config, of, own, lease = self.store.current, self.activity.told, resource.getrusage(resource.RUSAGE_SELF), self.swaps.lock_info()
        with open("/proc/self/statm", encoding="ascii") as f:
            resident = int(f.read().split()[1]) * resource.getpagesize()
        slots, views = list(self.slots(config)), [({"spark": s}, self.monitor.spark(s)) for s in config.sparks]
        sparks = [(labels, v if v.state == "ok" else SparkView(v.state)) for labels, v in views]        # what it told before is no news
        by = lambda counts, label: [("", {label: which}, n) for which, n in counts.items()]
        of_spark = lambda value: [("", labels, value(v)) for labels, v in sparks]
        of_slot = lambda value: [("", {"slot": s["name"]}, value(s)) for s in slots]
        known = lambda v: {**(v.ledger or {}), **{k: gb for k, gb in (v.memory or {}).items() if k in ("total_gb", "available_gb")}}
        memory = [("", {**labels, "part": part.removesuffix("_gb"), "name": name}, gb and gb * GIB)
                  for labels, v in sparks for part, parts in known(v).items()
                  for name, gb in (parts.items() if isinstance(parts, dict) else [("", parts)])]
        for name, kind, told, samples in (
                ("info", "gauge", "1, with the version", [("", {"version": VERSION}, 1)]),
                ("process_cpu_seconds_total", "counter", "CPU time of sparkctl, without ssh", [("", {}, own.ru_utime + own.ru_stime)]),
                ("process_resident_bytes", "gauge", "memory of sparkctl itself", [("", {}, resident)]),
                ("process_threads", "gauge", "threads of sparkctl itself", [("", {}, threading.active_count())]),
                ("slot_up", "gauge", "1 while a slot serves", [
                    ("", {"slot": s["name"], "model": s["model"] or s["served_id"] or ""}, s["state"] == "serving") for s in slots]),
                ("slot_in_flight", "gauge", "requests that are at the engine through sparkctl", of_slot(lambda s: s["in_flight"])),
                ("slot_held", "gauge", "requests that wait for a swap", of_slot(lambda s: s["held"])),
                ("engine_running", "gauge", "requests that the engine works on", of_slot(lambda s: s["facts"].get("running"))),
                ("engine_waiting", "gauge", "requests that wait in the engine", of_slot(lambda s: s["facts"].get("waiting"))),
                ("engine_kv_use", "gauge", "share of the KV cache in use", of_slot(lambda s: s["facts"].get("kv_use"))),
                ("engine_tokens_per_s", "gauge", "tokens made a second", of_slot(lambda s: s["facts"].get("tokens_per_s"))),
                ("swaps_total", "counter", "swaps that are over", [
                    ("", {"outcome": end}, of("event").get(f"swap_{word}", 0)) for end, word in SWAP_ENDS.items()]),
                ("swap_running", "gauge", "1 while a swap runs", [("", {}, bool(self.swaps.book.running))]),
                ("swap_phase_seconds", "summary", "time that the phases of swaps took", [
                    ("_" + end, {"phase": phase}, of("phase_" + end).get(phase, 0)) for end in ("sum", "count") for phase in TRANSITIONS if phase not in TERMINAL]),
                ("lock_held", "gauge", "1 while somebody holds the lock", [("", {}, lease["locked"])]),
                ("lock_queue", "gauge", "who wait for the lock", [("", {}, lease.get("queue", 0))]),
                ("events_total", "counter", "events", by(dict.fromkeys(EVENTS, 0) | of("event"), "kind")),
                ("webhook_deliveries_total", "counter", "deliveries that are over", by(dict.fromkeys(("delivered", "refused", "failed", "dropped"), 0) | self.webhooks.outcomes(), "outcome")),
                ("spark_up", "gauge", "1 while a Spark answers", of_spark(lambda v: v.state == "ok")),
                ("spark_memory_bytes", "gauge", "where a Spark's memory is", memory),
                ("spark_gpu_busy_percent", "gauge", "share of time that the GPU was busy", of_spark(lambda v: v.gpu and v.gpu["busy"])),
                ("spark_power_watts", "gauge", "power that the GPU draws", of_spark(lambda v: v.gpu and v.gpu["power_w"])),
                ("spark_gpu_celsius", "gauge", "temperature of the GPU", of_spark(lambda v: v.gpu and v.gpu["temperature_c"])),
                ("spark_celsius", "gauge", "the highest temperature of the Spark's other sensors", of_spark(lambda v: v.temperature_c)),
                ("spark_load", "gauge", "load average of a minute", of_spark(lambda v: v.load)),
                ("spark_memory_pressure_percent", "gauge", "share of 10 s in which something waited for memory",
                 of_spark(lambda v: v.memory and v.memory["pressure"])),
                ("spark_disk_free_bytes", "gauge", "room where the models are", of_spark(lambda v: v.disk and v.disk["free_gb"] * GIB)),
                ("service_up", "gauge", "1 while a service is well", [
                    ("", {"service": t["name"], "kind": t["kind"]}, t["state"] == "serving") for t in self.tiles(config)])):
            yield "sparkctl_" + name, kind, told, samples
        yield from self.activity.families()

    @staticmethod
    def spark_of(config, service):
        """The Spark of a service, logged in to as the service's own user."""
        spark = config.sparks[service.host]
        return dataclasses.replace(spark, user=service.user or spark.user)


# --- handlers

def get_page(app, r):
    """The page, whose one script and one style are allowed by their hashes."""
    try:
        with open(os.path.join(HERE, "index.html"), "rb") as f:
            page = f.read()
    except OSError as e:
        raise Refused(500, "no_page", f"index.html beside sparkctl.py cannot be read: {e.strerror}; copy it there") from None
    hashes = {tag: " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body).digest()).decode()}'" for body in
                            re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.S)) or "'none'" for tag in ("script", "style")}
    return 200, page, {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy":
                       f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
                       "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}


def get_state(app, r):
    if "since" in r.query:
        app.poll(r, lambda: app.hub.version() != r.query["since"], r.query.get("wait", 0))
    return 200, app.state()


def right_of(r):
    """What a caller brings to act against or under the lock."""
    return {"token": r.headers.get("x-swap-lock-token", ""), "force": r.query.get("force", False), "client": r.client}


def post_swap(app, r):
    config, body = app.store.current, dict(r.json)
    key, lock = body.pop("model", None), body.pop("lock", None)
    needed(r.json, "model")
    if lock is not None and body.get("dry_run"):
        raise Refused(422, "bad_field", "a dry run needs no lock: leave it out", field="lock")
    idempotency = None
    if (given := r.headers.get("idempotency-key")) is not None:
        if not 0 < len(given) <= 255:
            raise Refused(400, "bad_request", "Idempotency-Key must have 1 to 255 characters")
        idempotency = given, hashlib.sha256(to_json([sorted(r.json.items()), r.query.get("force", False)])).hexdigest()
    model, slot = entry_of(config.models, "model", key), pick_slot(config, body.pop("slot", None))
    return app.swap(r, slot, model.key, {**body, **right_of(r)}, r.query.get("wait"), lock, idempotency)


def post_lock(app, r):
    lease = app.take_lock(r, r.json, r.headers.get("x-swap-lock-token", ""), swap="asked", told=False)
    return 201, app.lock_reply(app.swaps.answered(lease.fence) or lease)        # it may have been over at once


def post_job(app, r):
    needed(r.json, "id", "kind", "cron", *filter(None, [JOB_NEEDS.get(r.json.get("kind"))]))
    config = app.store.current
    for what, entries in (("model", config.models), ("slot", config.layout.slots), ("service", config.layout.services)):
        if what in r.json:
            entry_of(entries, what, r.json[what])
    return app.put_entry(r, "job", app.jobs)


def post_webhook_test(app, r):
    """Send a test to every receiver and tell what came of it."""
    ids = app.webhooks.tell({"kind": "test", "at": utc(), "text": f"{r.client} asked for a test"})
    if not ids:
        raise Refused(409, "no_webhook", "there is nobody to tell: set WEBHOOK_URL first")
    mine = lambda: [row for row in app.webhooks.deliveries() if row["id"] in ids]
    app.poll(r, lambda: all(row["outcome"] != "queued" for row in mine()), 3 * Webhooks.LIMIT_S)
    if not all(row["outcome"] == "delivered" for row in mine()):
        raise Refused(502, "not_delivered", "a receiver did not take it: see outcome and detail of its row", deliveries=mine())
    return 200, {"deliveries": mine()}


def get_swap(app, r):
    swap, since = functools.partial(app.swaps.get, r.args["id"]), r.query.get("since", math.inf)
    app.poll(r, lambda: swap().phase in TERMINAL or swap().seq > since, r.query.get("wait", 0))
    return 200, swap().public()


def stream_swap(app, r):
    """Server-sent events. An id is `log lines.phases.seq` seen so far, so that Last-Event-ID resumes exactly there."""
    swap = app.swaps.get(r.args["id"])
    last = re.fullmatch(r"(\d{1,9})\.(\d{1,4})\.(\d{1,9})(\.end)?", r.headers.get("last-event-id", ""), re.ASCII)
    if last and last[4] and swap.phase in TERMINAL:
        return 204, b"", {}                     # tells an EventSource not to come back

    def run(send):
        swap_log, n, shown, quiet = app.swaps.log_of(swap.id), [int(last[i]) for i in (1, 2, 3)] if last else [0, 0, 0], None, 0

        def event(name, data, mark=""):
            send(f"event: {name}\nid: {n[0]}.{n[1]}.{n[2]}{mark}\ndata: ".encode() + to_json(data) + b"\n\n")
        send(b"retry: 1000\n\n")
        while not app.closing.is_set():
            s = app.swaps.get(swap.id)          # before the lines: at the end none is missed
            for phase, at, _ in s.phases[n[1]:]:
                n[1] += 1
                event("phase", {"phase": phase, "started_at": at, "seq": s.seq})
            for number_, at, said in swap_log.after(n[0]):
                n[0] = number_
                event("log", {"n": number_, "at": at, "text": said})
            n[2], told = s.seq, {**s.public()["progress"], "eta_seconds": s.eta_seconds, "slower": s.slower, "phase": s.phase}
            if told != shown:
                shown = told
                event("progress", {**told, "seq": s.seq})
            if swap_log.after(n[0], 1):
                continue
            if s.phase in TERMINAL:
                return event("end", s.public(), ".end")
            # log lines alone do not wake the hub, so look for them four times a second
            changed = app.hub.wait_for(lambda: app.swaps.get(swap.id).seq > n[2] or app.closing.is_set(), 0.25)
            quiet = 0 if changed else quiet % 60 + 1
            if quiet == 60:
                send(b": keep-alive\n\n")
    return 200, run


def repo_model(app, key):
    """The model of that key, if its weights come from Hugging Face. Raises Refused 404, 409."""
    model = entry_of(app.store.current.models, "model", key)
    if model.local_path:
        raise Refused(409, "local_model", f"{key} is a directory of yours ({model.local_path}): sparkctl neither downloads nor deletes it, do that there by hand")
    return model


def post_download(app, r):
    model, sparks = repo_model(app, r.args["key"]), app.store.sparks
    slot = pick_slot(app.store.current, None)
    needs = slot.hosts if model.mode == "cluster" else slot.hosts[:1]
    names_ = [entry_of(sparks, "spark", name).name for name in r.json.get("hosts", needs)]
    id_ = app.transfers.begin(model, names_, r.client)
    if not id_:
        return 200, {"model": model.key, "hosts": names_, "state": "complete", "note": "nothing to do: the weights are there"}
    return 202, next(t for t in app.transfers.shown() if t["id"] == id_)


def delete_disk(app, r):
    model, config = repo_model(app, r.args["key"]), app.store.current
    names_ = [entry_of(config.sparks, "spark", r.query["host"]).name] if "host" in r.query else list(config.sparks)

    def refuse_if_used():
        served = app.monitor.served | {name: app.serves(slot) for name, slot in config.layout.slots.items()}
        if why := weights_used_by(model, config, app.swaps.book, served):
            raise Refused(409, "model_serving", f"the weights of {model.key} are in use: {why}; serve another model or unload first")
    refuse_if_used()
    others = [m.key for m in config.models.values() if m.repo == model.repo and m.key != model.key]
    if others and not r.query.get("force"):
        raise Refused(409, "repo_shared", f"{', '.join(others)} needs {model.repo} too; force=true deletes it all the same", models=others)
    with app.swaps.holding(**right_of(r), what=f"the deletion of {model.key}'s weights", ttl=0):
        return 200, {"model": model.key, "repo": model.repo, "hosts": app.transfers.delete(model, names_, r.client, refuse_if_used)}


def post_restart(app, r):
    """Restart a service's container; with follow what is said meanwhile as a stream, whose last line tells that it was."""
    restart = functools.partial(app.restart, r.args["name"], **right_of(r))
    if r.query.get("follow"):
        return 200, lambda send: send(f"-- {restart(send=send)}\n".encode()), TEXT
    return 200, {"restarted": r.args["name"], "detail": restart()}


def get_service_logs(app, r):
    """The log of a service's container as text; with follow a stream until the client leaves."""
    config = app.store.current
    service, follow = app.contained(config, r.args["name"]), r.query.get("follow", False)
    spark, script = app.spark_of(config, service), logs_script(service.container, r.query.get("tail", 200), follow)
    left = types.SimpleNamespace(is_set=lambda: app.closing.is_set() or r.gone())
    read = functools.partial(app.on_spark, spark, "logs_failed", f"{service.name} on {service.host}: ", script, 3700 if follow else 30, left)
    return 200, read, TEXT


def get_v1_models(app, r):
    config, served = app.store.current, app.monitor.served
    rows = [(name, key) for key, ids in served.items() if place_of(config, key) for name in ids]
    if config.settings["AUTO_SWAP"]:
        known = {name for name, _ in rows}
        rows += [(m.key, None) for m in config.models.values() if known.isdisjoint(m.served_names)]
    return 200, {"object": "list", "data": [
        {"id": name, "object": "model", "created": 0, "owned_by": "sparkctl", "slot": key, "root": getattr(config.find(name), "source", name)}
        for name, key in rows]}


def add_model(doc, config, key, entry):
    """Add an entry to the overrides file's mapping; ConfigStore.edit judges it. Raises Refused 409."""
    if key in (*doc["models"], *config.models, *config.hidden):
        raise Refused(409, "model_exists", f"there is a model {key} already{', hidden' if key in config.hidden else ''}: take another key, or change that one", model=key)
    doc["models"][key] = entry


def post_model(app, r):
    entry = {k: v for k, v in parse_json(r.body).items() if v is not None}
    needed(entry, "key")
    key = checked({"key": entry.pop("key")}, {"key": matching(KEY.pattern, f"must match {KEY.pattern}")}, "the body")["key"]
    after = app.edit_models(r, key, "added", lambda doc, config: add_model(doc, config, key, entry))[1]
    return 201, app.model(after, key), {"Location": f"/api/models/{key}"}


def refuse_used(app, key):
    if app.in_use(key):
        raise Refused(409, "model_serving", f"{key} is served or being loaded: serve another model or unload first", model=key)
    if moving := [t for t in app.transfers.running() if t["model"] == key]:
        raise moving_with(moving[0])


def drop_model(app, r):
    key = r.args["key"]
    if not app.model(app.store.current, key)["added"]:
        raise Refused(409, "not_added", f'{key} stands in models.yaml, which is yours; to hide it PUT /api/models/{key} {{"hidden": true}}')
    refuse_used(app, key)

    def change(doc, config):
        entry_of(config.models | config.hidden, "model", key)
        doc.update({name: {k: v for k, v in doc[name].items() if k != key} for name in ("models", "knobs")})
        doc["hidden"] = [k for k in doc["hidden"] if k != key]
    app.edit_models(r, key, "removed", change)
    return 200, {"deleted": key}


def put_model(app, r):
    needed(r.json, "hidden")
    key, hide = r.args["key"], r.json["hidden"]
    if not app.model(app.store.current, key)["hidden"] and hide:
        refuse_used(app, key)

    def change(doc, config):
        entry_of(config.models | config.hidden, "model", key)
        doc["hidden"] = [k for k in doc["hidden"] if k != key] + ([key] if hide else [])
    return 200, app.model(app.edit_models(r, key, "hid" if hide else "showed", change)[1], key)


def put_knobs(app, r):
    key, given = r.args["key"], parse_json(r.body)
    app.model(app.store.current, key)
    try:                                        # names that only go, too
        parse_knobs(given)
    except ValueError as e:
        raise Refused(422, "bad_field", printable(str(e), 300), field="knobs") from None

    def change(doc, config):
        entry_of(config.models | config.hidden, "model", key)           # somebody may have removed it meanwhile
        old = doc["knobs"].get(key)
        old = {str(k): v for k, v in old.items()} if isinstance(old, dict) else {}
        new = respelled(given, [*dict((config.models | config.hidden)[key].knobs), *old])
        left = {k: v for k, v in {**old, **new}.items() if k not in new or v is not None}
        doc["knobs"] = {k: v for k, v in {**doc["knobs"], key: left}.items() if v or k != key}
    before, after = app.edit_models(r, key, f"changed knobs ({', '.join(given)}) of", change)
    return 200, {**app.model(after, key), "before": app.command(before, key), "after": app.command(after, key), "takes_effect":
                 "at the next load; until then it serves with the old ones (POST /api/swap with restart: true loads it again)"
                 if app.in_use(key) else "at once: the next swap to it uses them"}


def get_settings(app, r):
    store, settings = app.store, app.store.settings
    return 200, {"settings": settings.public(), "warnings": settings.warnings,
                 "restart_needed": [s.name for s in SETTINGS if s.restart and settings[s.name] != store.started[s.name]]}


def put_settings(app, r):
    given, store = parse_json(r.body), app.store
    stranger = exposure(store.started["SPARKCTL_BIND"], store.settings["SPARKCTL_API_KEY"], root=False)[0]

    def parse(s, value):
        parts = value if isinstance(value, list) else [value]
        require(not any(isinstance(part, (dict, list)) for part in parts), "must be text, a number, true, false or a list of texts")
        require(not s.secret or value is None or isinstance(value, (str, list)), "must be text")
        require(s.name != "SPARKCTL_DATA", "says where settings.yaml is, so it cannot stand in it: use the environment or --data")
        got = s.parse(setting_text(value) or s.default)
        if s.name == "SPARKCTL_BIND":           # what would keep the next start from starting
            require(not exposure(got, "", os.geteuid() == 0, False)[1], "must be a loopback address while sparkctl runs as root")
            with contextlib.suppress(OSError), socket.create_server((got, 0), family=socket.AF_INET6 if ":" in got else socket.AF_INET):
                return
            raise ValueError("is not an address of this machine")
        if s.name == "MODELS_OVERRIDES" and value:
            folder, taken = os.path.dirname(store.paths["settings"]), {os.path.realpath(path) for what, path in store.paths.items() if what != "overrides"}
            path = os.path.realpath(os.path.join(folder, got))
            require(got.endswith((".yaml", ".yml")) and path not in taken and os.path.isdir(os.path.dirname(path)),
                    "must be a .yaml file of its own in a directory that exists")
    for name in given:
        if stranger and name in SETTING and SETTING[name].guarded:
            raise Refused(403, "setting_protected", f"{name} can be changed with an API key only, or where sparkctl listens on loopback: "
                          "set it in the environment or in settings.yaml", name=name)
    checked(given, {s.name: functools.partial(parse, s) for s in SETTINGS}, "the body")
    for name in given:
        if (source := store.settings.sources[name]) in PINNED:
            raise Refused(409, "pinned", f"{name} comes from the {source}, which goes first: change it there", name=name, source=source)

    def change(doc, config):
        doc.update(given)
        for name in (name for name, value in given.items() if not setting_text(value)):
            del doc[name]
    before, after = store.edit("settings", change)
    if after is not before:
        app.events.add("settings_changed", f"{r.client} set {', '.join(sorted(given))}", client=r.client, names=sorted(given))
    return get_settings(app, r)


class Route(NamedTuple):
    method: str
    path: str
    handler: Callable
    query: dict = {}
    body: dict | None = None    # None: a body is not read as JSON
    open: bool = False          # needs no API key
    slow: bool = False          # asks Sparks or engines: counts as one who waits

    def match(self, path):
        return re.fullmatch(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/]+)", re.escape(self.path)), path)


WAIT, FORCE, SINCE = {"wait": number(0, 86400)}, {"force": flag}, {"since": number(0, 10**15, int)}
LOCK_BODY = {"holder": line_of(100), "ttl": amount(1, LEASE_MAX_S, "seconds"), "wait": amount(0, 86400, "seconds"), "note": line_of(500)}
SWAP_BODY = {"model": line_of(200), "slot": line_of(64), "dry_run": boolean, "rollback": boolean, "restart": boolean,
             "skip_checks": lambda value: tuple(map(choice(*list(CHECKS)[2:]), expect("list", value))), "note": line_of(500),
             "lock": lambda value: checked(expect("mapping", value), LOCK_BODY, "lock")}


def spark_names(value):
    """A list of different names of Sparks, not empty."""
    require(expect("list", value) and len(set(map(str, value))) == len(value), "must name different Sparks")
    return list(map(line_of(64), value))


ROUTES = (
    Route("GET",    "/",                     get_page, open=True),
    Route("GET",    "/healthz",              lambda app, r: (200, {"status": "ok", "version": VERSION}), open=True),
    Route("GET",    "/api/state",            get_state, {"since": line_of(80), "wait": number(0, 55)}),
    Route("GET",    "/api/models",
          lambda app, r: (200, {"models": app.models(app.store.current, r.query.get("hidden", False))}), {"hidden": flag}),
    Route("POST",   "/api/models",           post_model),
    Route("GET",    "/api/models/{key}",     lambda app, r: (200, app.model(app.store.current, r.args["key"]))),
    Route("PUT",    "/api/models/{key}",     put_model, {}, {"hidden": boolean}),
    Route("DELETE", "/api/models/{key}",     drop_model),
    Route("PUT",    "/api/models/{key}/knobs", put_knobs),
    Route("GET",    "/api/swap",             lambda app, r: (200, {"running": (s := app.swaps.book.running) and s.public(),
                                                                   "recent": [old.public() for old in app.swaps.recent]})),
    Route("POST",   "/api/swap",             post_swap, WAIT | FORCE, SWAP_BODY),
    Route("GET",    "/api/swap/lock",        lambda app, r: (200, app.swaps.lock_info())),
    Route("POST",   "/api/swap/lock",        post_lock, {}, LOCK_BODY),
    Route("DELETE", "/api/swap/lock",        lambda app, r: (200, {"locked": False, "released": app.swaps.release(**right_of(r))}), FORCE),
    Route("GET",    "/api/swap/{id}",        get_swap, WAIT | SINCE),
    Route("DELETE", "/api/swap/{id}",        lambda app, r: (202, app.swaps.cancel(r.args["id"], **right_of(r)).public()), FORCE),
    Route("GET",    "/api/swap/{id}/stream", stream_swap),
    Route("POST",   "/api/swap/{key}/validate", lambda app, r: (200, app.swaps.validate(*fitting(
        entry_of((config := app.store.current).models, "model", r.args["key"]), pick_slot(config, r.json.get("slot"))))), {}, {"slot": line_of(64)}, slow=True),
    Route("POST",   "/api/unload",           lambda app, r: app.swap_reply(r, app.swaps.start(
        pick_slot(app.store.current, r.json.get("slot")).name, None, note=r.json.get("note", ""), **right_of(r)), r.query.get("wait")), WAIT | FORCE, {"slot": line_of(64), "note": line_of(500)}),
    Route("GET",    "/api/schedule",         lambda app, r: (200, dict(zip(("schedules", "conflicts"), app.schedules.view())))),
    Route("POST",   "/api/schedule",         lambda app, r: app.put_entry(r, "schedule", app.schedules), {},
          {k: v for k, v in SCHEDULE.items() if k != "registered_at"}),
    Route("DELETE", "/api/schedule/{id}",    lambda app, r: app.drop_entry(r, "schedule", app.schedules)),
    Route("GET",    "/api/jobs",             lambda app, r: (200, {"jobs": app.jobs.shown()})),
    Route("POST",   "/api/jobs",             post_job, {}, JOB),
    Route("DELETE", "/api/jobs/{id}",        lambda app, r: app.drop_entry(r, "job", app.jobs)),
    Route("GET",    "/api/disk",             lambda app, r: (200, app.transfers.disk({
        m.key for m in app.store.current.models.values() if weights_used_by(m, app.store.current, app.swaps.book, app.monitor.served)})), slow=True),
    Route("POST",   "/api/models/{key}/download", post_download, {}, {"hosts": spark_names}, slow=True),
    Route("DELETE", "/api/models/{key}/download", lambda app, r: (202, {"cancelled": app.transfers.cancel(r.args["key"], r.client)})),
    Route("DELETE", "/api/models/{key}/disk", delete_disk, {"host": line_of(64)} | FORCE, slow=True),
    Route("GET",    "/api/webhooks",         lambda app, r: (200, {
        "receivers": len(app.store.settings["WEBHOOK_URL"]), "events": app.store.settings["WEBHOOK_EVENTS"],
        "signed": bool(app.store.settings["WEBHOOK_SECRET"]), "deliveries": app.webhooks.deliveries()})),
    Route("POST",   "/api/webhooks/test",    post_webhook_test),
    Route("POST",   "/api/services/{name}/restart", post_restart, FORCE | {"follow": flag}, slow=True),
    Route("GET",    "/api/services",         lambda app, r: (200, {"services": app.tiles(app.store.current)})),
    Route("GET",    "/api/services/{name}/logs", get_service_logs, {"tail": number(0, 10_000, int), "follow": flag}, slow=True),
    Route("GET",    "/api/endpoints",        lambda app, r: (200, app.endpoints(r))),
    Route("GET",    "/api/connectivity",     lambda app, r: (200, app.connectivity()), slow=True),
    Route("GET",    "/api/history",          lambda app, r: (200, app.monitor.history.read(time.time(), r.query.get("minutes", 60))),
          {"minutes": number(1, 1440, int)}),
    Route("GET",    "/metrics",              lambda app, r: (200, prometheus(app.families()), {"Content-Type": TEXT["Content-Type"].replace(";", "; version=0.0.4;")})),
    Route("GET",    "/api/health/deep",      lambda app, r: (200, app.health()), slow=True),
    Route("GET",    "/api/events",           lambda app, r: (200, {"events": app.events.since(r.query.get("since", 0))}), SINCE),
    Route("GET",    "/api/settings",         get_settings),
    Route("PUT",    "/api/settings",         put_settings),
    Route("GET",    "/api/activity",         lambda app, r: (200, {"requests": app.activity.recent()})),
    Route("GET",    "/v1/models",            get_v1_models),
)


def find_route(method, path):
    """(Route, path fields). HEAD is GET without the body. Raises Refused 404 with the nearest path, 405 with Allow."""
    rows = [(route, m) for route in ROUTES if (m := route.match(path))]
    for route, m in rows:
        if route.method == ("GET" if method == "HEAD" else method):
            return route, {k: urllib.parse.unquote(v) for k, v in m.groupdict().items()}
    methods = {route.method for route, _ in rows} | ({"POST"} if path in PROXIED else set())
    if methods:
        allow = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
        raise Refused(405, "method_not_allowed", f"{printable(method, 20)} does nothing here: use {allow}", {"Allow": allow})
    hint = nearest(path, [*(route.path for route in ROUTES), *PROXIED])
    raise Refused(404, "not_found", f"there is no path {printable(path, 200)}; " + (f"did you mean {hint}? " if hint else "") + "README.md lists all", nearest=hint)


class Handler(BaseHTTPRequestHandler):
    """One connection: requests one after the other, read under limits, answered in one write."""

    def setup(self):
        self.connection, self.buffer, self.close_connection, self.lingers = self.request, b"", False, False
        self.poll = select.poll()
        self.poll.register(self.connection, select.POLLIN)
        self.shares_cpu = False
        self.known = None, None, None           # (head but for its length, Config, Request) of the last /v1 request, which was let in
        bound_socket(self.connection, HEAD_S, SEND_S)

    def handle(self):
        with contextlib.suppress(OSError):      # of a reply that says what is wrong
            self.one_request()
            bound_socket(self.connection, IDLE_S, SEND_S)
            while not self.close_connection:
                self.one_request()

    def finish(self):
        """What was refused may still be on its way: closing at once would make its sender lose the answer."""
        with contextlib.suppress(OSError):
            if self.lingers:
                self.connection.shutdown(socket.SHUT_WR)
                until = time.monotonic() + LINGER_S
                while (left := until - time.monotonic()) > 0 and self.poll.poll(left * 1000) and self.connection.recv(READ):
                    pass

    def one_request(self):
        began, request, asked, status, size = time.monotonic(), None, "- -", 0, 0
        self.reserved = busy = 0
        self.unread = False                     # whether bytes of this request's body are still to come, which are no next request
        try:
            head = self.read_head()
            busy = self.server.count(1)
            if busy > 1 and not self.shares_cpu and self.known[0]:
                self.share_cpu(True)
            m, (known, config, request) = LENGTH.search(head), self.known
            if m and known == head[:m.start()] + head[m.end():] and config is self.server.app.store.current:
                asked, began, self.unread = self.asked, request.renew().began, True
                status, size = self.proxy(self.server.app, request, int(m[1]))
                return
            request = None
            request, length = parse_head(head)
            began, self.unread = request.began, length != 0
            asked, self.close_connection = f"{request.method} {request.path}", request.close
            request.client, request.gone = self.client_address[0], self.client_gone
            status, size = self.answer(request, length)
            if m and request.where and request.path not in UPLOADS:
                self.known, self.asked = (head[:m.start()] + head[m.end():], self.let_in, request), asked
        except (ClientGone, Cancelled, OSError):
            self.close_connection = True
            status = 499 if busy else 0         # nginx's word for: the client closed the connection
        except Exception as e:
            if not isinstance(e, Refused):
                log(f"{asked}: {type(e).__name__}: {e}\n{traceback.format_exc()}")
                e = Refused(500, "internal", "an internal error of sparkctl: its own log has the cause, please report it")
            self.known = None, None, None       # what was kept for the next request may be why
            # after one of these, what follows on this connection cannot be trusted to be a request
            self.close_connection |= self.unread or e.status in (400, 408, 413, 431, 500)
            self.lingers = self.close_connection
            e.__traceback__ = None              # its frames hold it, and the body too
            status, size = self.reply(request, e.status, e.body(), e.headers)
        finally:
            if self.reserved:
                self.reserve(-self.reserved)
            if request or status:
                self.tell(request, began, asked, status, size)
            if busy:
                self.server.count(-1)

    def tell(self, r, began, asked, status, size):
        """Leave a row for the log of requests, and for Activity."""
        row = (time.time(), self.client_address[0], asked, status, size, time.monotonic() - began, r.id if r else "-")
        if r and r.model is not None:
            served = self.server.app.monitor.served.get(r.where)
            row += (r.model, r.where, served[0] if served else "", r.first, r.streams, r.tail)
        elif r and (r.streams or "wait" in r.query):
            row += (None,)
        self.server.activity.add(row)

    # --- reading

    def receive(self, deadline, slow=None):
        """Add to the buffer. Raises ClientGone at the connection's end; at the deadline Refused 408 saying slow, or ClientGone."""
        if not self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise Refused(408, "too_slow", slow) if slow else ClientGone()
        chunk = self.connection.recv(READ)
        if not chunk:
            raise ClientGone()
        self.buffer += chunk

    def read_head(self):
        """Bytes of the next head. Raises Refused 408, 431, or ClientGone; a slow sender has HEAD_S from its first byte on."""
        data = self.buffer
        if not data:
            try:
                data = self.connection.recv(READ)           # as long as bound_socket said
            except BlockingIOError:
                raise ClientGone() from None
            if not data:
                raise ClientGone()
        end = data.find(b"\r\n\r\n")
        if end <= 0 or data[0] in b"\r\n":
            self.buffer, deadline = data.lstrip(b"\r\n"), time.monotonic() + HEAD_S
            while (end := self.buffer.find(b"\r\n\r\n")) < 0 and len(self.buffer) <= HEAD_MAX:
                if re.search(rb"(?<!\r)\n", self.buffer):
                    raise Refused(400, "bad_request", "a line of the header ends without CR: see what the client sends")
                self.receive(deadline, f"the header was not complete within {HEAD_S:g} s: send it at once" if self.buffer else None)
                if not (rest := self.buffer.lstrip(b"\r\n")) and len(self.buffer) > 64:        # a few line ends between requests are enough
                    raise Refused(400, "bad_request", "line ends without a request: see what the client sends")
                self.buffer = rest
            data = self.buffer
        if not 0 <= end <= HEAD_MAX:
            raise Refused(431, "header_too_large", f"the header is larger than {HEAD_MAX} bytes: send less")
        self.buffer = data[end + 4:]
        return data[:end]

    def expect(self, request):
        """Tell a client that waits for it to send its body."""
        if request.headers.get("expect", "").lower() == "100-continue" and request.minor and not self.buffer:
            self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")

    def reserve(self, size, most=0):
        """Room for so many bytes more, or fewer, of this request's body. Raises Refused 503 if all bodies together are too large."""
        self.server.bodies(size, 8 * most)
        self.reserved += size

    def read_body(self, request, length, most, together=None):
        """The whole body, at most `most` bytes; together: what eight bodies may be at once. Raises Refused 413, 408, 400, 503."""
        if 0 <= length <= len(self.buffer) and length <= most:
            body, self.buffer = self.buffer[:length], self.buffer[length:]
            return body
        too_large = Refused(413, "body_too_large", f"the body is larger than {most >> 20} MiB: send less{', or raise MAX_BODY_MB' if request.path in PROXIED else ''}")
        if length > most:
            raise too_large
        self.expect(request)
        deadline, slow = time.monotonic() + BODY_S, f"the body was not complete within {BODY_S:g} s: send less, or faster"
        if length >= 0:
            # mapped memory takes room only where something was written, and who announces much but sends nothing keeps nobody out
            body, got = mmap.mmap(-1, length) if length > READ else bytearray(length), len(self.buffer)
            body[:got], self.buffer = self.buffer, b""
            view = memoryview(body)
            while got < length:
                if length > READ and got >= self.reserved:
                    self.reserve(min(length, 2 * max(READ, got)) - self.reserved, together or most)
                if not self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                    raise Refused(408, "too_slow", slow)
                count = self.connection.recv_into(view[got:])
                if not count:
                    raise ClientGone()
                got += count
            return body
        end = BodyEnd(None, True, strict=True, keep=True)
        while True:
            self.take_part(end, self.buffer)
            if len(end.data) + end.left > most:
                raise too_large
            if len(end.data) > self.reserved:
                self.reserve(max(READ, len(end.data)), together or most)
            if end.done:
                return end.data
            if time.monotonic() > deadline:
                raise Refused(408, "too_slow", slow)
            self.buffer = b""
            self.receive(deadline, slow)

    def take_part(self, end, data):
        """What of data belongs to the body; what follows is the next request's beginning. Raises Refused 400."""
        try:
            part = end.take(data)
        except ValueError as e:
            raise Refused(400, "bad_request", str(e)) from None
        self.buffer = data[len(part):]
        return part

    def client_gone(self):
        """Whether the client hung up; what it sends ahead stays unread."""
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        return bool(poll.poll(0))

    # --- answering

    def share_cpu(self, wish):
        """Run on the one CPU where all relay who do so at the same time; or again wherever we may, and what we start."""
        if wish != self.shares_cpu:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, {self.server.cpu} if wish else self.server.cpus)
            self.shares_cpu = wish

    def answer(self, request, length):
        app, self.let_in = self.server.app, self.server.app.store.current      # the Config by which it is let in
        settings = self.let_in.settings
        proxied = request.path in PROXIED and request.method == "POST"
        try:
            route, request.args = (None, {}) if proxied else find_route(request.method, request.path)
            guard(request, settings, bool(route and route.open))
        except Refused as e:
            guard(request, settings, False) if e.status in (404, 405) else None     # a stranger learns no paths
            raise
        if proxied:
            return self.proxy(app, request, length)
        self.share_cpu(False)
        most = settings["MAX_BODY_MB"] << 20
        request.body, self.unread = self.read_body(request, length, min(most, API_BODY_MAX), most), False
        if request.raw_query.count("&") >= 50:
            raise Refused(400, "bad_request", "too many query fields: send fewer than 50")
        request.query = checked(dict(urllib.parse.parse_qsl(request.raw_query, keep_blank_values=True)), route.query, "the query")
        if route.body is not None:
            request.json = checked(parse_json(request.body), route.body, "the body")
        with app.parking() if route.slow else contextlib.nullcontext():
            answer = route.handler(app, request)
        return self.reply(request, *answer)

    def reply(self, request, status, content, headers=()):
        """Send one reply -> (status, bytes of body). content: bytes, what JSON can hold, or run(send), a stream until it returns."""
        streams, head_only = callable(content), request is not None and request.method == "HEAD"
        self.close_connection |= streams
        if streams:
            request.streams = True
        body = b"" if streams else content if isinstance(content, bytes) else to_json(content) + b"\n"
        fields = {"Content-Type": "text/event-stream" if streams else "application/json", **dict(headers),
                  "X-Request-Id": request.id if request else secrets.token_hex(8), "Date": formatdate(usegmt=True),
                  "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}
        if not streams and status != 204:
            fields["Content-Length"] = len(body)
        if self.close_connection:
            fields["Connection"] = "close"
        first = f"HTTP/1.1 {status} {http.client.responses.get(status, 'Refused')}"
        head = "\r\n".join([first, *(f"{k}: {v}" for k, v in fields.items()), "", ""]).encode("latin-1", "replace")
        if not streams or head_only:
            self.connection.sendall(head if head_only else head + body)
            return status, len(body)
        size = None                             # of what was sent of the body

        def send(data):                         # raises OSError when the client left
            nonlocal size
            self.connection.sendall(data if size is not None else head + data)
            size = (size or 0) + len(data)
        with getattr(self.server.app, "parking", contextlib.nullcontext)():
            try:
                content(send)
                send(b"")
            except Exception as e:
                if size is None or isinstance(e, (OSError, ClientGone)):       # a refusal like any other, or nobody to be told
                    raise
                if not isinstance(e, (Refused, Cancelled)):
                    log(f"a stream broke off: {traceback.format_exc()}")
                send(f"-- {e if isinstance(e, (Refused, Cancelled)) else 'an internal error'}\n".encode() if fields["Content-Type"] == TEXT["Content-Type"] else b"")
        return status, size

    def proxy(self, app, request, length):
        """A /v1 request: read it, wait for its turn, relay -> (status, bytes)."""
        config, request.model, feed = app.store.current, "", None
        if request.path in UPLOADS:
            name, feed = self.begin_upload(request, length, config.settings["MAX_UPLOAD_MB"] << 20)
        else:
            request.body, self.unread = self.read_body(request, length, config.settings["MAX_BODY_MB"] << 20), False
            try:
                name = model_of_json(request.body)
            except (ValueError, RecursionError):
                raise Refused(400, "bad_json", "the body must be a JSON object") from None
            length = len(request.body)
        if name is not None and not isinstance(name, str):
            raise Refused(422, "bad_field", "model must be text: a name of GET /v1/models", field="model")
        request.model = (name or "")[:300]      # Activity keeps it, and clients may make up names of any length
        request.where, ticket = app.admit(request, name)

        def sent(whole=True):
            if whole and self.reserved:
                self.reserve(-self.reserved)
            if ticket:
                app.gate.step_out(request.where, ticket)
        try:
            if request.forwarded[0] is not config or request.forwarded[1] != request.where:
                endpoint = app.endpoint(request.where)
                request.forwarded = config, request.where, endpoint, forwarded_head(request, endpoint)
            framing = b"Content-Length: %d\r\n\r\n" % length if length >= 0 else b"Transfer-Encoding: chunked\r\n\r\n"
            status, size, goes_on = relay(self.connection, request, app.pool, request.forwarded[2], request.forwarded[3] + framing,
                                          feed, sent, self.close_connection)
        finally:
            app.gate.leave(request.where)
            sent()
        self.close_connection |= not goes_on
        return status, size

    def begin_upload(self, request, length, most):
        """(the form's field model, if it is among the first bytes, else None; what passes the rest on). Raises Refused 413, 408, 400."""
        too_large = Refused(413, "body_too_large", f"the upload is larger than {most >> 20} MiB: cut it, or raise MAX_UPLOAD_MB")
        if length > most:
            raise too_large
        self.expect(request)
        end, slow, name = BodyEnd(None if length < 0 else length, length < 0, strict=True, keep=True), "the upload stood still for a minute: send it again", None
        until, looked = time.monotonic() + BODY_S, -4096
        while True:
            data, self.buffer = self.buffer, b""
            request.body += self.take_part(end, data)
            if len(end.data) - looked >= 4096 or end.done or len(end.data) >= READ:     # not for every byte of a slow one
                looked, name = len(end.data), model_of_form(bytes(end.data), request.headers.get("content-type", ""))
            if name is not None or end.done or len(end.data) >= READ:
                break
            self.receive(until, slow)
        end.data, size, self.unread = None, len(request.body), not end.done

        def feed(upstream):
            nonlocal size
            poll = select.poll()
            for sock in (upstream, self.connection):
                poll.register(sock, select.POLLIN)
            while not end.done:
                ready = [fd for fd, _ in poll.poll(BODY_S * 1000)]
                if not ready:
                    raise Refused(408, "too_slow", slow)
                if upstream.fileno() in ready:
                    if upstream.recv(10, socket.MSG_PEEK) == b"HTTP/1.1 1":        # 100 Continue and its like: the answer is yet to come
                        poll.unregister(upstream)
                        continue
                    self.lingers = True
                    return False
                chunk = self.connection.recv(READ * 4)
                if not chunk:
                    raise ClientGone()
                part = self.take_part(end, chunk)
                size += len(part)
                if size > most + READ:          # of chunks that did not say beforehand how much they are
                    raise too_large
                upstream.sendall(part)
            self.unread = False
            return True
        return name, feed


def capacity_of(cpu):
    """How fast the kernel thinks a CPU is beside others, 0 where all are alike; half of a GB10's are slow ones."""
    with contextlib.suppress(OSError, ValueError), open(f"/sys/devices/system/cpu/cpu{cpu}/cpu_capacity", encoding="ascii") as f:
        return int(f.read())
    return 0


class Server(ThreadingHTTPServer):
    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, address, app, handler=Handler):
        self.app, self.activity = app, getattr(app, "activity", None) or Activity()
        self._lock = threading.Lock()
        self._busy = 0                          # guarded by _lock; requests being answered
        self._clients = collections.Counter()   # guarded by _lock; address -> its connections
        self._bodies = 0                        # guarded by _lock; bytes of bodies of more than READ bytes that are being read
        # Python runs one thread at a time: to hand over to one on another CPU costs three times what it does on the same
        self.cpus = os.sched_getaffinity(0)
        self.cpu = max(self.cpus, key=lambda n: (capacity_of(n), n))
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def process_request(self, request, client_address):
        if self.admit(client_address[0]):
            with contextlib.suppress(RuntimeError):         # the system gives us no more threads
                return super().process_request(request, client_address)
            self.dismiss(client_address[0])
        body = to_json(Refused(503, "too_many_connections", f"more than {CONNECTIONS_MAX} connections, or {CLIENT_MAX} of one client: close some").body())
        with contextlib.suppress(OSError):
            request.settimeout(1)
            request.sendall(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\n"
                            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        self.shutdown_request(request)

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.dismiss(client_address[0])

    def admit(self, client):
        """Whether there is room for another connection of that address."""
        with self._lock:
            free = self._clients.total() < CONNECTIONS_MAX and self._clients[client] < CLIENT_MAX
            if free:
                self._clients[client] += 1
            return free

    def dismiss(self, client):
        with self._lock:
            self._clients -= {client: 1}        # those with none left go

    def count(self, by):
        """Count a request in or out -> how many are being answered."""
        with self._lock:
            self._busy += by
            return self._busy

    def bodies(self, by, most):
        """Count bytes of bodies. Raises Refused 503 if that were more than `most` altogether."""
        with self._lock:
            if by > 0 and self._bodies + by > most:
                raise Refused(503, "too_much_at_once", "the bodies of the requests that are being read are too large together: ask again in a second", {"Retry-After": "1"})
            self._bodies += by

    def finish(self, timeout_s):
        """Close the listening socket, wait for replies in flight, and write the rest of the log."""
        self.server_close()
        deadline = time.monotonic() + timeout_s
        time.sleep(0.005)
        while self.count(0) and time.monotonic() < deadline:
            time.sleep(0.005)
        self.activity.close()

    def handle_error(self, request, client_address):
        log(f"connection of {client_address[0]}: {traceback.format_exc()}")


# === 15 demo ==================================================================
# Two pretended Sparks on this machine and an engine that talks like vLLM, run as real processes by the very same
# swap code (a command template on `local` hosts). The engine ends when sparkctl does.

DEMO_MODELS = """
models:
  tiny-chat: {name: Tiny Chat 7B, repo: demo/tiny-chat, aliases: [gpt-4o-mini], KNOBS, description: A pretended solo model that echoes you.}
  wide-chat: {name: Wide Chat 120B, repo: demo/wide-chat, mode: cluster, KNOBS, description: A pretended model sharded over both Sparks.}
  house-style: {name: House Style (fine-tuned), local_path: LOCAL, KNOBS, description: A pretended model from a directory on the Spark.}
  bad-luck: {name: Bad Luck, repo: demo/bad-luck, KNOBS, description: A pretended model whose load fails and is rolled back.}
  too-greedy: {name: Too Greedy 235B, repo: demo/too-greedy, knobs: {gpu-memory-utilization: 0.99}, description: A pretended model that is too large for this machine.}
"""
DEMO_SERVICES = """
slots:
  main: {hosts: [spark1, spark2], port: PORT, container: demo-engine, backend: demo}
backends:
  demo:
    stop: p=$(cat DIR/{container}.pid 2>/dev/null) && kill "$p" 2>/dev/null; rm -f DIR/{container}.pid
    launch: "(PYTHON SCRIPT demo-engine {port} {model} {served_names} >DIR/{container}.log 2>&1 &
      echo $! >DIR/{container}.pid; wait) >/dev/null 2>&1 &"
    logs: tail -n +1 -F DIR/{container}.log 2>/dev/null
    alive: read -r p <DIR/{container}.pid && kill -0 "$p"
services:
  embeddings: {host: spark1, port: SIDE0, container: tiny-embed}
  kokoro: {host: spark2, port: SIDE1, container: kokoro}
  qdrant: {host: spark2, port: SIDE2, container: qdrant}
"""
DEMO_SIDE = ("tiny-embed", "kokoro", "qdrant")          # containers of the services
DEMO_DOCKER = """#!/bin/sh
for c; do :; done                                      # the last word: the container
case "$*" in
  ps*) n=0; for c in SIDES; do n=$((n+1)); printf "%064d $c Up 3 hours\\n" $n; done ;;
  logs\\ -f*) exec tail -n 1 -f DIR/$c.log ;;
  logs*) exec tail -n "$3" ${5:+-f} DIR/$c.log ;;        # as many arguments has it with -f
  restart*) sleep 1; echo "INFO:     $c was restarted (pretended)" >>DIR/$c.log; echo "$c" ;;
esac
"""
DEMO_SMI = "#!/bin/sh\ncase $1 in *gpu=*) echo $(($(date +%s) / 7 % 40)), 24.6, 48, 2405, pretended ;; esac\n"


def demo_setup(folder):
    """Write the demo's files, its models.yaml and services-overrides.yaml among them, below folder -> settings as environment."""
    tries = secrets.SystemRandom().sample(range(12000, 32000), 50)          # below the ports that the system gives to outgoing connections
    free = (str(port) for port in tries if socket.socket().connect_ex(("127.0.0.1", port)))           # nobody listens there now
    ports = list(itertools.islice(free, 1 + len(DEMO_SIDE)))
    with open("/proc/meminfo", encoding="ascii") as f:
        memory = parse_meminfo(f.read().splitlines())
    share = max(1.8, min(6, memory["MemAvailable"] / 3)) / memory["MemTotal"]         # of this machine's memory, that the models fit beside what runs there
    words = {"PORT": ports[0], **{f"SIDE{n}": port for n, port in enumerate(ports[1:])}, "SIDES": " ".join(DEMO_SIDE), "DIR": quote_arg(folder),
             "PYTHON": quote_arg(sys.executable), "SCRIPT": quote_arg(os.path.abspath(__file__)), "LOCAL": json.dumps(f"{folder}/house-style", ensure_ascii=False),
             "KNOBS": f"knobs: {{max-model-len: 8192, gpu-memory-utilization: {share:.3f}}}"}
    weights = {"house-style": 0.5, **{f"hub/models--demo--{name}/snapshots/1": gb for name, gb in (("tiny-chat", 0.5), ("wide-chat", 0.8), ("bad-luck", 0.6), ("too-greedy", 118))}}
    files = {f"{source}/{name}": "{}" for source in weights for name in ("config.json", "model.safetensors")}
    files |= {"models.yaml": DEMO_MODELS, "services-overrides.yaml": DEMO_SERVICES, "bin/docker": DEMO_DOCKER, "bin/nvidia-smi": DEMO_SMI}
    for name, said in files.items():
        path = os.path.join(folder, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as f:
            f.write(re.sub(rf"\b({'|'.join(words)})\b", lambda m: words[m[1]], said))
            f.truncate(int(weights[os.path.dirname(name)] * GIB) if name.endswith(".safetensors") else f.tell())       # takes no room
        os.chmod(path, 0o700)
    os.environ.update(HF_HUB_CACHE=os.path.join(folder, "hub"), SPARKCTL_DEMO_PID=str(os.getpid()), PATH=f"{folder}/bin:{os.environ['PATH']}")
    for name, port in zip(DEMO_SIDE, ports[1:]):
        with open(os.path.join(folder, name + ".log"), "ab") as f:
            spawn([sys.executable, os.path.abspath(__file__), "demo-engine", port, "demo/side", "side"], stdin=subprocess.DEVNULL, stdout=f, stderr=f)
    return {"SPARK1_HOST": "local", "SPARK2_HOST": "local", "LOCAL_MODEL_ROOTS": folder}


class DemoEngine(Handler):
    """Answers like vLLM 0.33, and like a few services. Its server's app is the model's names."""

    made = collections.Counter()                # tokens so far, by VLLM_METRICS; counted about right is enough here

    def metrics(self):
        busy = self.server.count(0) - 1
        told = {"running": busy, "waiting": 0, "kv_use": min(1, 0.04 * busy), "prompt_tokens": 0, "generation_tokens": 0, **self.made}
        return "".join(f"{name} {told[ours]}\n" for name, ours in VLLM_METRICS.items()).encode()

    def answer(self, request, length):
        asked, names = parse_json(self.read_body(request, length, 32 << 20)), self.server.app
        cards = [{"id": name, "object": "model", "owned_by": "vllm"} for name in names]
        known = {"/health": {}, "/v1/models": {"object": "list", "data": cards}, "/version": {"version": "0.33.0"}, "/readyz": {},
                 "/info": {"model_id": "demo/tiny-embed"}, "/v1/embeddings": {"data": [{"embedding": [0.6, 0.8]}]}, "/v1/audio/speech": b"RIFF",
                 "/v1/audio/voices": {"voices": ["af_heart", "bf_emma"]}, "/metrics": self.metrics(), "/collections": {"result": {"collections": [{"name": "notes"}]}}}
        if request.method == "GET" or request.path in known or request.path not in ("/v1/chat/completions", "/v1/completions"):
            return self.reply(request, 200 if request.path in known else 404, known.get(request.path, {"detail": "Not Found"}))
        name = asked.get("model") or names[0]
        if name not in names:
            raise Refused(404, "NotFoundError", f"The model `{name}` does not exist.")
        chat, streams = request.path == "/v1/chat/completions", bool(asked.get("stream"))
        said = (asked.get("messages") or [{}])[-1].get("content", "") if chat else asked.get("prompt", "")
        text = f"This is {names[0]}, a pretended model. You said: {said}"
        usage = {"prompt_tokens": len(str(said).split()), "completion_tokens": len(text.split())}
        usage["total_tokens"] = sum(usage.values())
        self.made["prompt_tokens"] += usage["prompt_tokens"]
        self.made["generation_tokens"] += 0 if streams else usage["completion_tokens"]
        base = {"id": "demo-" + request.id, "created": int(time.time()), "model": names[0],
                "object": "text_completion" if not chat else "chat.completion.chunk" if streams else "chat.completion"}

        def choices(text, finish):
            part = {"delta" if streams else "message": {"role": "assistant", "content": text}} if chat else {"text": text}
            return [{"index": 0, "finish_reason": finish, **part}]

        def run(send):
            for word in re.findall(r"\S+\s*", text):
                send(b"data: " + to_json({**base, "choices": choices(word, None)}) + b"\n\n")
                self.made["generation_tokens"] += 1
                time.sleep(0.03)
            send(b"data: " + to_json({**base, "choices": [], "usage": usage}) + b"\n\ndata: [DONE]\n\n")
        return self.reply(request, 200, run if streams else {**base, "choices": choices(text, "stop"), "usage": usage})


def demo_engine(port, model, *names):
    """Load for three seconds, saying what vLLM would, then serve until told to end or until sparkctl is gone."""
    lines = [f"INFO vLLM server version 0.33.0 (pretended), serving model {model}", f"INFO Starting to load model {model}...",
             *(f"Loading safetensors checkpoint shards: {n * 100 // 12:3}% Completed | {n}/12 [00:01<00:01, 6it/s]" for n in range(1, 13)),
             "INFO Model loading took 61.204518 GiB memory and 2.040000 seconds", "INFO torch.compile took 0.40 s in total",
             "INFO GPU KV cache size: 1,711,646 tokens, Maximum concurrency for 8,192 tokens per request: 208.94x",
             "INFO Capturing CUDA graphs (decode, FULL): 100%|##########| 35/35"]
    fails = {"bad-luck": "ValueError: To serve at least one request with the model's max seq len (8192), (2.25 GiB KV cache is needed, which is larger than the "
             "available KV cache memory (0.75 GiB). Based on the available memory, the estimated maximum model length is 2730.",
             "too-greedy": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 6.12 GiB."}.get(names[0])
    lines[10:] = [fails, "RuntimeError: Engine core initialization failed. See root cause above."] if fails else lines[10:]
    for line in lines if model != "demo/side" else ():      # the pretended services are up at once
        print(f"(EngineCore pid={os.getpid()})", line.replace("INFO", time.strftime("INFO %m-%d %H:%M:%S [demo.py:1]"), 1), flush=True)
        time.sleep(0.17)
    if fails:
        return 1
    server = Server(("127.0.0.1", int(port)), names, DemoEngine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("INFO:     Application startup complete.", flush=True)
    while os.path.exists(f"/proc/{os.environ['SPARKCTL_DEMO_PID']}"):
        time.sleep(0.3)
    return 0


# === 16 command line ==========================================================


def build_settings(args, environ):
    """Command line and environment -> (Settings, data directory, {name: path of a YAML file}, what makes Settings of settings.yaml)."""
    flags = {"SPARKCTL_BIND": args.bind, "SPARKCTL_PORT": args.port, "SPARKCTL_DATA": args.data}
    parse = lambda values: parse_settings(environ, values, flags)
    settings = parse({})
    data_dir = os.path.join(HERE, settings["SPARKCTL_DATA"])
    with contextlib.suppress(OSError, ValueError):          # ConfigStore reports it
        settings = parse(read_yaml(os.path.join(data_dir, "settings.yaml")))
    paths = {"settings": os.path.join(data_dir, "settings.yaml"),
             "models": args.models or os.path.join(HERE, "models.yaml"),
             "services": args.services or os.path.join(HERE, "services-overrides.yaml"),
             "overrides": os.path.join(data_dir, settings["MODELS_OVERRIDES"] or "models-overrides.yaml")}
    return settings, data_dir, paths, parse


def refuse(why):
    """Say in one line why we do not start -> exit code."""
    print(f"sparkctl: {why}", file=sys.stderr)
    return 2


def run_check(store, found):
    """Print everything in force and every problem, those already found first -> exit code. No Spark is contacted."""
    config = store.current
    layout, slots, models, hidden = config.layout, config.layout.slots.values(), config.models.values(), config.settings["DISABLED_SERVICES"]
    hosts = collections.Counter(s.host for s in config.sparks.values() if not s.local)
    found += [*config.settings.warnings, *map(str, config.problems), *(f"two Sparks have the same host {h}" for h in sorted(hosts) if hosts[h] > 1)]
    found += [NO_SPARK] * (not config.sparks) + ["the catalog is empty: write models.yaml, or copy the one that came with sparkctl"] * (not models)
    for title, lines in (
            ("Settings", [f"{row['name']} = {setting_text(row['value'])}  ({row['source']})" for row in config.settings.public()
                          if row["source"] != "default" or not re.match(r"SPARK\d_", row["name"])]),
            ("Sparks", [f"{s.name}: {f'{s.user}@' if s.user else ''}{s.host}" for s in config.sparks.values()]),
            ("Slots", [f"{s.name}: {', '.join(s.hosts)}, port {s.port}, container {s.container}, backend {s.backend}" for s in slots]),
            ("Backends", [f"{k}: {printable(t.launch, 200)}" for k, t in {"launch-cluster": LAUNCH_CLUSTER, **layout.backends}.items()]),
            ("Services", [f"{s.name}: {s.kind} on {s.host} port {s.port}{' (disabled)' if s.name in hidden else ''}"
                          for s in layout.services.values() if s.configured]),
            (f"Models ({len(models)})", [f"{m.key}: {m.source} ({m.mode}) answers to {', '.join(m.served_names)}" for m in models]),
            ('No Spark was contacted; a dry run does: POST /api/swap?wait=60 {"model": KEY, "dry_run": true}', []),
            ("Problems" if found else "No problems in settings and files", found)):
        print(title, *lines, sep="\n  ")
    return 1 if found else 0


def run_import(store, files, write):
    """Recipes as catalog entries: printed, or added to the overrides file -> exit code 0; 1: one is not imported, 2: one cannot be read."""
    status, done = 0, set()
    for path in files:
        key = re.sub(r"[^a-z0-9._-]+", "-", re.sub(r"\.ya?ml$", "", os.path.basename(path).lower())).strip("-._")[:64]
        try:
            with open(path, "rb") as f:
                data, notes = f.read(1 << 20), []
            try:
                recipe = parse_yaml(data)
            except ValueError as e:             # a real recipe gives `container` twice
                require("given twice" in str(e), str(e))
                recipe, notes = parse_yaml(data, yaml.SafeLoader), [f"{e}; the last one counts"]
            entry, more = import_recipe(recipe, max(2, len(store.sparks)))
            require(key not in done, f"{key} was imported from another file already")
            try:
                store.edit("overrides", lambda doc, config, key=key, entry=entry: add_model(doc, config, key, entry), dry=not write)
            except Refused as e:
                require(e.status == 409 and not write, str(e))
                more.append(str(e))
        except (OSError, ValueError) as e:
            status = max(status, 2 if isinstance(e, OSError) else 1)
            print(f"{printable(path, 300)}: not imported: {printable(getattr(e, 'strerror', None) or str(e), 500)}", file=sys.stderr)
            continue
        done.add(key)
        for note in notes + more:
            print(f"{printable(path, 300)}: {note}", file=sys.stderr)
        title = printable(path, 300) + (f", added to {store.paths['overrides']}" if write else ", to paste under `models:`")
        told = "".join(f"# {line}\n" for line in (title, *notes, *more))
        print(re.sub("(?m)^(?=.)", "  ", told + to_yaml({key: entry})), end="")
    return status


def serve(store, data_dir, allow_root, demo):
    """Run until SIGTERM or SIGINT -> exit code."""
    settings = store.settings
    warnings, refused = exposure(settings["SPARKCTL_BIND"], settings["SPARKCTL_API_KEY"], os.geteuid() == 0, allow_root)
    if refused:
        return refuse(warnings[0])
    sys.setswitchinterval(0.0005)               # a busy thread must not delay the relay of tokens
    threading.stack_size(4 << 20)               # virtual memory; in 1 MiB the json of Python 3.13 dies of deep nesting
    with contextlib.suppress(OSError, AttributeError):  # M_MMAP_THRESHOLD of mallopt(3): else each thread's arena keeps what a large body took
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = math.inf if hard == resource.RLIM_INFINITY else hard
    with contextlib.suppress(OSError, ValueError):      # every connection may need one to the engine as well
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, 4096), most), hard))
    try:
        lock = open(os.path.join(data_dir, "lock"), "wb")       # open until we end
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in os.listdir(data_dir):       # what a crash left of an atomic write
            if name.startswith(".tmp-"):
                os.unlink(os.path.join(data_dir, name))
        app = App(store, data_dir, demo)
        server = Server((settings["SPARKCTL_BIND"], settings["SPARKCTL_PORT"]), app)
    except BlockingIOError:
        return refuse(f"{data_dir}: another sparkctl uses this data directory")
    except (OSError, ValueError) as e:          # ValueError: an address that no name can be
        return refuse(f"cannot start on {settings['SPARKCTL_BIND']} port {settings['SPARKCTL_PORT']} with data in {data_dir}: {e}")
    told, tell = socket.socketpair()            # the kernel may give a signal to any thread, and only a byte wakes this one
    tell.setblocking(False)
    signal.set_wakeup_fd(tell.fileno())
    for number_ in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else [])):    # nohup
        signal.signal(number_, lambda *_: None)
    app.start()
    threading.Thread(target=server.serve_forever, args=(0.1,), name="accept", daemon=True).start()
    for warning in (*settings.warnings, *map(str, store.current.problems), *app.exposed(), *app.warnings):
        log(f"warning: {warning}")
    print(f"sparkctl {VERSION} on {Endpoint(*server.server_address[:2]).url}/", flush=True)
    told.recv(1)
    server.shutdown()                           # no new connections; engines are left running
    app.close()
    server.finish(5)
    end_children()
    return 0


def main(argv):
    if argv[:1] == ["demo-engine"]:
        return demo_engine(*argv[1:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Every setting is an environment variable: see README.md")
    parser.add_argument("command", nargs="?", choices=("serve", "check", "import-recipe"), default="serve",
                        help="serve (the default): run; check: print what is in force, with every problem; "
                        "import-recipe: turn recipes of spark-vllm-docker into models")
    parser.add_argument("files", nargs="*", metavar="FILE", help="recipes to import")
    parser.add_argument("--write", action="store_true", help="add imported models to the overrides file instead of printing them")
    parser.add_argument("--version", action="version", version=f"sparkctl {VERSION}")
    parser.add_argument("--bind", metavar="A", help="address to listen on")
    parser.add_argument("--port", metavar="N", help="port to listen on")
    parser.add_argument("--data", metavar="DIR", help="directory for state")
    parser.add_argument("--models", metavar="FILE", help="the catalog, instead of models.yaml beside the script")
    parser.add_argument("--services", metavar="FILE", help="instead of services-overrides.yaml beside the script")
    parser.add_argument("--demo", action="store_true", help="two pretended Sparks on this machine; needs no hardware")
    parser.add_argument("--allow-root", action="store_true", help="run as root on a non-loopback address all the same")
    args = parser.parse_intermixed_args(argv)
    if bool(args.files) != (args.command == "import-recipe") or args.write and not args.files:
        parser.error("FILE and --write belong to import-recipe, which needs a FILE")
    for wrong in parse_settings({}, flags={"SPARKCTL_BIND": args.bind, "SPARKCTL_PORT": args.port}).warnings:
        parser.error(wrong.removesuffix("; using the next source"))
    os.umask(0o077)
    environ = os.environ
    with contextlib.ExitStack() as cleanup:
        if args.demo:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="sparkctl-demo-"))
            args.data = args.data or folder
            args.models, args.services = os.path.join(folder, "models.yaml"), os.path.join(folder, "services-overrides.yaml")
            real = re.compile(r"SPARK\d_|VLLM_|LAUNCH_DIR|LOCAL_MODEL_ROOTS|MODELS_OVERRIDES|SPARKCTL_DATA|DISABLED_SERVICES")
            environ = {k: v for k, v in os.environ.items() if not real.match(k)} | demo_setup(folder)
        settings, data_dir, paths, parse = build_settings(args, environ)
        place = data_dir
        with contextlib.suppress(OSError):      # `check` changes nothing
            if args.command == "serve" or args.write:
                os.makedirs(data_dir, mode=0o700, exist_ok=True)
        while not os.path.lexists(place):
            place = os.path.dirname(place)
        found = [] if os.path.isdir(place) and os.access(place, os.R_OK | os.W_OK | os.X_OK) else [
            f"the data directory {data_dir} cannot be used: this user may not write into {place}; give it that right, or another directory with --data"]
        store = ConfigStore(settings, paths, parse)
        if args.command == "serve":
            return refuse(found[0]) if found else serve(store, data_dir, args.allow_root, args.demo)
        if unreadable := [p for p in (args.models, args.services) if p and not os.access(p, os.R_OK)]:
            return refuse(f"{' and '.join(unreadable)} cannot be read")
        if args.command == "import-recipe":
            return refuse(found[0]) if found and args.write else run_import(store, args.files, args.write)
        return run_check(store, found + exposure(settings["SPARKCTL_BIND"], settings["SPARKCTL_API_KEY"], False)[0])


if __name__ == "__main__":
    status = 1
    with contextlib.suppress(BrokenPipeError):          # `check | head`
        status = main(sys.argv[1:])
        sys.stdout.flush()
    os._exit(status)    # at once: a daemon thread in the middle of a log line could hang or abort a normal exit
