"""Run the app: a simulation, or a SuperLink and two SuperNodes as processes: python -m examples.federated_flower.run.

Everything that is started is ended again, and Flower's own files go into a temporary folder. The account of bytes and
scores is written to ``--out``: open ``federated.html``.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

APP = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
CLIENTS = 2
START_S, END_S = 120, 10


def main() -> None:
    """Start what is needed, run the app, say what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--deployment", action="store_true", help="processes on loopback instead of a simulation")
    parser.add_argument("--strategy", default="FedAvg", choices=["FedAvg", "FedAvgM", "FedAdam"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("federated-account"))
    parser.add_argument("--timeout", type=float, default=600, help="seconds after which all is ended")
    arguments = parser.parse_args()
    if not (BIN / "flwr").exists():
        sys.exit("Flower is not installed beside this Python; pip install 'kompakt[federated]'")
    out = arguments.out.resolve()
    (out / "federated.json").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        home, link = Path(folder), _port()
        environment = _environment(home)
        stack.callback(_end_left, home)
        kind = [] if arguments.deployment else ["--simulation"]
        command = ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", *kind]
        stack.enter_context(
            _started([*command, "--host", "127.0.0.1", "--port", str(link)], environment, home / "link")
        )
        _wait(f"http://127.0.0.1:{link}/health", home / "link")
        for part in range(CLIENTS) if arguments.deployment else ():
            node = f"partition-id={part} num-partitions={CLIENTS}"
            command = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{link}", "--node-config", node]
            stack.enter_context(_started([*command, "--port", str(_port())], environment, home / f"node-{part}"))
        text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
        (home / "config.toml").write_text(text)
        knobs = f'rounds={arguments.rounds} strategy="{arguments.strategy}" out="{out}"'
        run = [str(BIN / "flwr"), "run", str(APP), "here", "--stream", "--run-config", knobs]
        found = subprocess.run(run, env=environment, timeout=arguments.timeout, check=False).returncode
        logs = [path.read_text()[-4000:] for path in (*home.glob("link"), *home.glob("node-*"))]
    account = json.loads((out / "federated.json").read_text()) if (out / "federated.json").exists() else {"scores": []}
    # ``flwr run`` ends well even where the app did not.
    if found or not account["scores"] or account["scores"][-1]["round"] != arguments.rounds:
        sys.exit("\n".join([*logs, "the app did not come to its last round; see above"]))
    _say(account, out)


def _say(account: dict, out: Path) -> None:
    """One line a score, and the bytes."""
    for row in account["scores"]:
        print(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    for row in account["clients"]:
        print(f"round {row['round']}, client {row['client']}: {row['down_bytes']:,} down, {row['up_bytes']:,} up")
    print(f"{account['totals']['down_bytes']:,} bytes down, {account['totals']['up_bytes']:,} up; see {out}")


def _environment(home: Path) -> dict[str, str]:
    offline = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    offline |= {"RAY_USAGE_STATS_ENABLED": "0", "DIGITS_CLIENTS": str(home / "clients"), "OMP_NUM_THREADS": "1"}
    return os.environ | offline | {"PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"}


def _port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def _started(command: list[str], environment: dict[str, str], log: Path) -> Iterator[None]:
    """A process, and whatever it starts, until the block ends."""
    with log.open("w") as file:
        program = [str(BIN / command[0]), *command[1:]]
        process = subprocess.Popen(program, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            yield
        finally:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(END_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _end_left(home: Path) -> None:
    """Wait for what the processes started in sessions of their own; end what does not go. They know the folder."""
    for sign in (0, signal.SIGTERM, signal.SIGKILL):
        for pid in _left(home):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        end = time.monotonic() + END_S
        while _left(home) and time.monotonic() < end:
            time.sleep(0.2)


def _left(home: Path) -> list[int]:
    """Processes that have the folder in their environment (Linux; elsewhere none are found)."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"FLWR_HOME={home}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def _wait(address: str, log: Path) -> None:
    """Until a server answers."""
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    sys.exit(f"the SuperLink does not answer at {address}:\n{log.read_text()[-2000:]}")


if __name__ == "__main__":
    main()
