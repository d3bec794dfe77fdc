"""Detour's models in a process of their own, for bench/train.py, bench/scale.py, bench/breakeven.py (bench/worker.cc)."""
import json
import subprocess


class Worker:
    """Models of one length; `specs`: NAME=METHOD[:LAYOUT[:KEY=VALUE,...]][@SHARE]. `facts` are those of each, by name."""

    def __init__(self, args, length, sequences, specs):
        self.process = subprocess.Popen(
            [args.worker, args.config, str(length), str(sequences), str(args.share), str(args.threads), *specs],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self.process.stdout.readline())

    def ask(self, what, name):
        """`what`: train, prefill or decode."""
        self.process.stdin.write(f"{what} {name}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
