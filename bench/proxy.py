#!/usr/bin/env python3
"""The data path beside nginx: requests/s, added delay, streams, uploads, downloads, memory.

    python3 bench/proxy.py [--rounds 5] [--seconds 2] [--only requests,streams,bulk,memory]

Starts everything it compares on loopback: an engine that answers at once (bench/engine.c), nginx as a reverse proxy
(keep-alive upstream, unbuffered replies, a worker per core), and sparkctl, each in front of that one engine. Every
round asks every target in turn; the table has medians, and ratios within the run, which are what counts on a busy
machine. Needs gcc, wrk, nginx and curl. `--only swaps` instead runs the test that swaps back and forth under 32
clients, and accounts for every request, for a whole minute; it needs pytest.
"""
import argparse
import collections
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEY = "bench-key"
BODY = ('{"model":"stub","messages":[{"role":"system","content":"You are a helpful assistant."},{"role":"user","content":"Tell me something '
        'about proxies, please, in about a hundred words."}],"max_tokens":80,"temperature":0.7}')
LUA = f"""wrk.method = "POST"
wrk.path = "/v1/chat/completions"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer {KEY}"
wrk.body = '{BODY}'
done = function(s, l, r)
  io.write(string.format('JSON {{"n": %d, "us": %d, "bad": %d, "p50": %.1f, "p99": %.1f}}\\n', s.requests, s.duration,
    s.errors.status + s.errors.connect + s.errors.read + s.errors.write + s.errors.timeout, l:percentile(50), l:percentile(99)))
end
"""
NGINX = """USER worker_processes auto; daemon off; pid FOLDER/nginx.pid; error_log FOLDER/error.log;
events { worker_connections 2048; }
http {
  access_log FOLDER/access.log; client_body_temp_path FOLDER/body; proxy_temp_path FOLDER/proxy; fastcgi_temp_path FOLDER/f;
  uwsgi_temp_path FOLDER/u; scgi_temp_path FOLDER/s; client_max_body_size 0; keepalive_requests 1000000; sendfile on;
  upstream engine { server 127.0.0.1:ENGINE; keepalive 128; keepalive_requests 1000000; }
  server { listen 127.0.0.1:PORT backlog=1024;
    location / { proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 600s; } }
}
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as s:
        return s.getsockname()[1]


def answers(port, path="/v1/models"):
    for _ in range(200):
        with contextlib.suppress(OSError):
            ask = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Authorization": f"Bearer {KEY}"})
            if b"stub" in urllib.request.urlopen(ask, timeout=2).read():
                return
        time.sleep(0.05)
    sys.exit(f"nothing answers on port {port}")


class Target:
    def __init__(self, name, port, pid):
        self.name, self.port, self.pid = name, port, pid

    def tree(self):
        kids = collections.defaultdict(list)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                kids[int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])].append(int(pid))
        found = [self.pid]
        for pid in found:
            found += kids[pid]
        return found

    def memory(self, field="VmRSS"):
        """MB of the whole process tree."""
        return sum(int(re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) for pid in self.tree()) / 1024


class Bench:
    def __init__(self, targets, folder, seconds):
        self.targets, self.folder, self.seconds = targets, folder, seconds
        self.got = collections.defaultdict(lambda: collections.defaultdict(list))       # metric -> target -> values

    def add(self, metric, target, value):
        self.got[metric][target.name].append(value)

    def requests(self, t, clients):
        said = subprocess.run(["wrk", "-t1", f"-c{clients}", f"-d{self.seconds}s", "-s", f"{self.folder}/post.lua", f"http://127.0.0.1:{t.port}"],
                              capture_output=True, text=True).stdout
        got = json.loads(re.search("JSON (.*)", said)[1])
        if got["bad"]:
            print(f"  {t.name}: {got['bad']} errors at {clients} clients", file=sys.stderr)
        self.add(f"requests/s, {clients} clients", t, got["n"] / got["us"] * 1e6)
        self.add(f"p50 µs, {clients} clients", t, got["p50"])
        self.add(f"p99 µs, {clients} clients", t, got["p99"])

    def streams(self, t, count, total, kind):
        said = subprocess.run([f"{self.folder}/streams", "127.0.0.1", str(t.port), str(count), str(total), kind], capture_output=True, text=True).stdout
        got = json.loads(said)
        if got["bad"]:
            print(f"  {t.name}: {got['bad']} bad streams", file=sys.stderr)
        if kind == "fast":
            self.add(f"SSE chunks/s, {count} streams", t, got["chunks_s"])
            self.add(f"first byte µs, {count} streams", t, got["ttfb_p50_us"])
        else:
            self.add(f"delay of a chunk p50 µs, {count} paced streams", t, got["chunk_p50_us"])
            self.add(f"delay of a chunk p99 µs, {count} paced streams", t, got["chunk_p99_us"])

    def curl(self, t, what, *args):
        said = subprocess.run(["curl", "-s", "-o", "/dev/null", "-w", f"%{{http_code}} %{{speed_{what}}}", "-H", f"Authorization: Bearer {KEY}", *args],
                              capture_output=True, text=True).stdout.split()
        if said[0] != "200":
            print(f"  {t.name}: {what} answered {said[0]}", file=sys.stderr)
        return float(said[1]) / 1e6

    def upload(self, t, megabytes):
        with open(f"{self.folder}/upload", "wb") as f:
            f.truncate(megabytes << 20)
        return self.curl(t, "upload", "-F", "model=stub", "-F", f"file=@{self.folder}/upload", f"http://127.0.0.1:{t.port}/v1/audio/transcriptions")

    def bulk(self, t):
        self.add("upload MB/s", t, self.upload(t, 100))
        # a reply of 50 MB: the engine's answer to a completion whose prompt says `blob`
        self.add("download MB/s", t, self.curl(t, "download", "-d", '{"model":"stub","prompt":"blob"}', f"http://127.0.0.1:{t.port}/v1/completions"))

    def memory(self, t):
        if not t.pid:
            return
        self.add("RSS MB, fresh", t, t.memory())
        ask = (f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}").encode()
        with contextlib.ExitStack() as stack:
            def connect(data):
                sock = stack.enter_context(socket.create_connection(("127.0.0.1", t.port), 30))
                sock.sendall(data)
                return sock
            for _ in range(200):
                connect(ask).recv(65536)
            time.sleep(0.5)
            self.add("RSS MB, 200 idle connections", t, t.memory())
            if t.name == "sparkctl":
                state = urllib.request.Request(f"http://127.0.0.1:{t.port}/api/state", headers={"Authorization": f"Bearer {KEY}"})
                version = json.load(urllib.request.urlopen(state))["version"]
                for _ in range(200):
                    connect(f"GET /api/state?since={version}&wait=50 HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode())
                time.sleep(1)
                self.add("RSS MB, 200 idle and 200 parked", t, t.memory())
        time.sleep(0.5)
        for pid in t.tree():
            with contextlib.suppress(OSError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")         # the high-water mark starts anew
        before = t.memory()
        self.upload(t, 200)
        self.add("RSS growth in a 200 MB upload, MB", t, t.memory("VmHWM") - before)

    def table(self):
        names = [t.name for t in self.targets]
        print("| |", " | ".join(names), "| sparkctl : nginx |\n| --- |", " | ".join(["---:"] * (len(names) + 1)), "|")
        for metric, by_target in self.got.items():
            mid = {name: statistics.median(values) for name, values in by_target.items()}
            cells = [f"{mid[n]:,.0f}" if mid.get(n, 0) >= 100 else f"{mid[n]:.1f}" if n in mid else "" for n in names]
            ratio = f"{mid['sparkctl'] / mid['nginx']:.2f}" if mid.get("nginx") and "sparkctl" in mid else ""
            if {"direct", "nginx", "sparkctl"} <= mid.keys() and "µs" in metric:        # what the proxy adds
                added = [mid[n] - mid["direct"] for n in ("nginx", "sparkctl")]
                ratio += f" (added: {added[0]:.0f} and {added[1]:.0f}, {added[1] / max(added[0], 0.1):.2f})"
            print(f"| {metric} |", " | ".join(cells), f"| {ratio} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2, help="of each measurement of requests/s")
    parser.add_argument("--only", default="requests,streams,bulk,memory")
    parser.add_argument("--script", default=str(HERE.parent / "sparkctl.py"), help="another sparkctl.py, to compare")
    args = parser.parse_args()
    if args.only == "swaps":
        sys.exit(subprocess.call([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "under_32_clients", HERE.parent / "test_sparkctl.py"],
                                 env={**os.environ, "SWAP_SECONDS": "60"}))
    if missing := [p for p in ("gcc", "wrk", "nginx", "curl") if not shutil.which(p, path=os.environ["PATH"] + ":/usr/sbin")]:
        sys.exit(f"install {' '.join(missing)}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        def run(*argv, **more):
            process = subprocess.Popen(argv, **more)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            return process.pid
        for program in ("engine", "streams"):
            subprocess.run(["gcc", "-O2", "-w", "-o", f"{folder}/{program}", HERE / f"{program}.c"], check=True)
        Path(folder, "post.lua").write_text(LUA)
        Path(folder, "models.yaml").write_text("models: {stub: {repo: org/stub}}")
        engine, port = free_port(), free_port()
        run(f"{folder}/engine", str(engine))
        answers(engine)
        words = {"USER": "user root;" if os.geteuid() == 0 else "", "FOLDER": folder, "ENGINE": str(engine), "PORT": str(port)}
        Path(folder, "nginx.conf").write_text(re.sub("|".join(words), lambda m: words[m[0]], NGINX))
        nginx = run("nginx", "-c", f"{folder}/nginx.conf", "-p", folder, env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin"})
        ours = free_port()
        clean = {k: v for k, v in os.environ.items() if not re.match("SPARK|VLLM", k)}
        with open(f"{folder}/sparkctl.log", "wb") as log:
            pid = run(sys.executable, args.script, "--port", str(ours), "--models", f"{folder}/models.yaml", stderr=log, stdout=log, env={
                **clean, "SPARKCTL_DATA": f"{folder}/data", "SPARK1_HOST": "local", "VLLM_PORT": str(engine), "SPARKCTL_API_KEY": KEY})
        answers(port)
        answers(ours)
        bench = Bench([Target("direct", engine, 0), Target("nginx", port, nginx), Target("sparkctl", ours, pid)], folder, args.seconds)
        only = args.only.split(",")
        if "memory" in only:                    # first: before the rest has filled any buffer
            for t in bench.targets:
                bench.memory(t)
        for n in range(args.rounds):
            print(f"round {n + 1} of {args.rounds}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
            for t in bench.targets if "requests" in only else ():
                for clients in (1, 8, 64):
                    bench.requests(t, clients)
            for t in bench.targets if "streams" in only else ():
                for job in ((1, 120, "fast"), (16, 192, "fast"), (32, 32, "paced")):
                    bench.streams(t, *job)
            for t in bench.targets if "bulk" in only else ():
                bench.bulk(t)
        bench.table()


if __name__ == "__main__":
    main()
