#!/usr/bin/env python3
"""What watching costs: CPU and memory of sparkctl, and of its ssh, while it looks at two idle Sparks and their services.

    python3 bench/watch.py [--seconds 120] [--poll 5]

Starts a real sshd on loopback with two aliases, so that ssh is the real one and multiplexed; the Spark's programs are the
stand-ins of the test rig. Prints one line each. Needs pytest (the rig lives in test_sparkctl.py) and openssh-server.
"""
import argparse
import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_sparkctl as t       # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def sshd(folder, rig):
    """A real sshd, and a directory whose `ssh` knows spark1 and spark2 by it -> that directory."""
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    path = f"{rig.spark('spark1')}/bin:/usr/bin:/bin"
    (folder / "sshd_config").write_text(f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\n"
                                        f"StrictModes no\nUsePAM no\nPasswordAuthentication no\nForceCommand PATH={path} sh -c \"$SSH_ORIGINAL_COMMAND\"\n")
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    (folder / "config").write_text(f"Host spark1 spark2\n HostName 127.0.0.1\n Port {port}\n User {pwd.getpwuid(os.getuid()).pw_name}\n"
                                   f" IdentityFile {folder}/user\n UserKnownHostsFile {folder}/known_hosts\n")
    (folder / "bin").mkdir()
    (folder / "bin/ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/config "$@"\n')
    (folder / "bin/ssh").chmod(0o755)
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", exist_ok=True)
    server = subprocess.Popen([shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-f", str(folder / "sshd_config")], stderr=subprocess.DEVNULL)
    try:
        yield folder / "bin"
    finally:
        server.terminate()
        server.wait()


def spent(pid):
    """(own CPU seconds, those of its ended children, MB resident, threads)."""
    cells = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(cells[11]) + int(cells[12])) / TICK, (int(cells[13]) + int(cells[14])) / TICK, int(cells[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6, int(cells[17])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=int, default=120)
    parser.add_argument("--poll", default="5")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        rig = t.Rig(folder)
        rig.port, rig.local = rig.free_port("spark1"), "/nowhere"
        stub = t.Stub(dict(t.STUBS["qdrant"][0]), "127.0.0.1")
        program = None
        try:
            with sshd(folder, rig) as programs:
                env = {**t.rig_env(rig, folder, POLL_SECONDS=args.poll), "PATH": f"{programs}:{os.environ['PATH']}"}
                (folder / "services.yaml").write_text(f"services: {{q: {{kind: qdrant, host: spark1, port: {stub.port}}}}}")
                program = t.Program(folder, env, ("--models", str(folder / "models.yaml"), "--services", str(folder / "services.yaml")))
                t.until(lambda: {s["state"] for s in t.spark_state(program).values()} == {"ok"})
                time.sleep(5)
                pid, before, began = program.process.pid, spent(program.process.pid), time.monotonic()
                time.sleep(args.seconds)
                after, took = spent(pid), time.monotonic() - began
                for name, value, unit in (("sparkctl itself", (after[0] - before[0]) / took * 100, "% of a core"),
                                          ("its ssh clients", (after[1] - before[1]) / took * 100, "% of a core"),
                                          ("resident", after[2], "MB"), ("threads", after[3], "")):
                    print(f"{name:20} {value:8.2f} {unit}")
        finally:
            if program:
                program.kill()
            stub.close()
            rig.close()


if __name__ == "__main__":
    main()
