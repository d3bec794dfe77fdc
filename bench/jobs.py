"""Programs side by side: starts them, shows how far they are, stops them cleanly, and says how much memory they took.

A job is a dict: `name`, `command` (a list), `log` (a file that its output is added to), and optionally `stdout` (a file
of its own), `total` and `progress` (a function: how much of the total is done), and `after` (a function of the job,
called when it has ended). run() adds `code` and `peak_rss_bytes`.
"""
import os
import shutil
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.1
LINE_SECONDS = 60  # between progress lines where there is no terminal


def start(job):
    with open(job["log"], "ab") as log, open(job.get("stdout", os.devnull), "wb") as own:
        # A group of its own: Ctrl-C reaches the children through stop() only, once.
        return subprocess.Popen(job["command"], stdin=subprocess.DEVNULL, stderr=log,
                                stdout=own if "stdout" in job else log, process_group=0)


def poll(job, process):
    """Whether the job has ended. wait4 knows the memory of this child; subprocess does not."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid == 0:
        return False
    process.returncode = job["code"] = os.waitstatus_to_exitcode(status)
    job["peak_rss_bytes"] = usage.ru_maxrss * 1024
    if "after" in job:
        job["after"](job)
    return True


def duration(seconds):
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60} min"


class Progress:
    """One line that says how far all jobs are and how long the rest takes, at the rate since the start."""

    def __init__(self, what, jobs):
        self.what, self.jobs, self.start = what, jobs, time.monotonic()
        self.terminal, self.last = sys.stderr.isatty(), 0.0
        self.before = sum(map(self.done, jobs))

    @staticmethod
    def done(job):
        if "code" in job:
            return job.get("total", 1)
        return min(job["progress"](), job["total"]) if "progress" in job else 0

    def show(self, active, last=False):
        now = time.monotonic()
        if not last and now - self.last < (1 if self.terminal else LINE_SECONDS):
            return
        self.last = now
        done, total = sum(map(self.done, self.jobs)), sum(job.get("total", 1) for job in self.jobs)
        ended = sum("code" in job for job in self.jobs)
        line = f"{self.what}: {100 * done / total:.0f} %, {ended} of {len(self.jobs)} done"
        if done > self.before and done < total:
            left = (total - done) * (now - self.start) / (done - self.before)
            line += f", about {duration(left)} left"
        running = [f"{job['name']} {100 * self.done(job) / job.get('total', 1):.0f} %" if "progress" in job
                   else job["name"] for job, _ in active]
        line += f" ({', '.join(running)})" if running else f" in {duration(now - self.start)}"
        if self.terminal:
            line = "\r\033[K" + line[:shutil.get_terminal_size().columns - 1]
        print(line, end="\n" if last or not self.terminal else "", file=sys.stderr, flush=True)


def run(what, jobs, at_once):
    """Runs all jobs, `at_once` at a time.

    Ctrl-C or SIGTERM: asks each running job to save and end, waits, and exits with 130; a second one asks again, which
    ends them at once.
    """
    if not jobs:
        return
    asked, passed_on = [], 0
    previous = {number: signal.signal(number, lambda *_: asked.append(1)) for number in (signal.SIGINT, signal.SIGTERM)}
    progress, waiting, active = Progress(what, jobs), list(jobs), []
    while active or (waiting and not asked):
        while waiting and not asked and len(active) < at_once:
            job = waiting.pop(0)
            active.append((job, start(job)))
        active = [(job, process) for job, process in active if not poll(job, process)]
        if len(asked) > passed_on:
            passed_on = len(asked)
            print(f"\nstopping: {', '.join(job['name'] for job, _ in active)}", file=sys.stderr, flush=True)
            for _, process in active:
                process.send_signal(signal.SIGINT)
        progress.show(active, last=not waiting and not active)
        time.sleep(POLL_SECONDS)
    for number, handler in previous.items():
        signal.signal(number, handler)
    if asked:
        sys.exit(130)
