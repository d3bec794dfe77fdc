"""The frame of the program: help, versions, exit codes and one-line errors, of whatever subcommands there are."""
import os
import re
import subprocess

DETOUR = os.environ["DETOUR_BIN"]


def run(*args, **kwargs):
    return subprocess.run([DETOUR, *args], capture_output=True, text=True, timeout=60, **kwargs)


def expect_error(result, code, *parts):
    assert result.returncode == code
    assert result.stdout == ""
    assert re.fullmatch(r"detour: error: [^\n]+\n", result.stderr), result.stderr
    for part in parts:
        assert part in result.stderr


def test_version_and_help():
    version = run("--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert re.fullmatch(r"detour \d+\.\d+\.\d+\n", version.stdout)
    for args in ([], ["--help"]):
        result = run(*args)
        assert (result.returncode, result.stderr) == (0, "")
        assert "Exit codes" in result.stdout


def test_every_command_has_help_with_an_example():
    listed = run("--help").stdout.split("Subcommands:")[1]
    commands = re.findall(r"^  (\w+) ", listed, re.M)
    assert "train" in commands
    for command in commands:
        result = run(command, "--help")
        assert result.returncode == 0
        assert "xample" in result.stdout, command


def test_wrong_usage():
    expect_error(run("trian"), 2, 'Did you mean "train"?', "Hint: run detour --help")
    expect_error(run("train", "--max-step", "3"), 2, 'Did you mean "--max-steps"?', "detour train --help")
    expect_error(run("train", "--max-steps", "many"), 2, "--max-steps", "detour train --help")
    expect_error(run("train", "--bad\nname"), 2)


def test_run_file(tmp_path):
    path = tmp_path / "run.toml"

    def train(text, *args):
        path.write_text(text)
        return run("train", "--config", str(path), *args)

    expect_error(train("\nmax_step = 3"), 2, f"{path}:2: unknown key", 'Did you mean "max_steps"?')
    expect_error(train("\nmax_steps = 'x'"), 2, f"{path}:2: ", "--max-steps")
    expect_error(train("max_steps = "), 2, f"{path}:1: ")
    expect_error(run("train", "--config", str(tmp_path / "none.toml")), 2, "none.toml")

    resolved = train("[schedule]\nmax_steps = 3", "--lr", "0.5", "--print-config")
    assert (resolved.returncode, resolved.stderr) == (0, "")
    assert "\nmax_steps = 3\n" in resolved.stdout
    assert "\nlr = 0.5\n" in resolved.stdout
    again = train(resolved.stdout, "--print-config")
    assert (again.returncode, again.stdout) == (0, resolved.stdout)


def test_output_that_cannot_be_written():
    with open("/dev/full", "w") as full:
        result = subprocess.run([DETOUR, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 1
    assert result.stderr == "detour: error: standard output cannot be written\n"


def test_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run([DETOUR, "--help"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert result.returncode == -13
    assert result.stderr == ""
