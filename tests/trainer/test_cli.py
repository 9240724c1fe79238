"""The command lines on tiny data: what works, and what a mistake says in one line."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from click.testing import CliRunner

from darht.cache.builder.teachers import CARD, WEIGHTS, load_teacher, read_card
from darht.cache.export.webdataset import export_webdataset
from darht.cache.read.reader import open_cache
from darht.core.cli import command_again
from darht.core.nets import build
from darht.trainer.cli import evaluate, teacher, train
from darht.trainer.student import train as trainer
from darht.trainer.teacher import check

CPU = torch.device("cpu")
SMALL = '{"width": 4, "blocks": [1, 1, 1, 1]}'
STUDENT = ("student.arch=resnet18", "student.kwargs.width=4", "student.kwargs.blocks=[1, 1, 1, 1]")
FAST = ("optim.epochs=1", "optim.batch_size=32", "inner.steps=1", *STUDENT)


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def assigned(*assignments):
    return [part for assignment in assignments for part in ("--set", assignment)]


def succeed(command, *arguments):
    result = call(command, *arguments)
    assert result.exit_code == 0, result.output
    return result


def fail(command, *arguments, code=2):
    """The one line that a mistake is answered with."""
    result = call(command, *arguments)
    assert isinstance(result.exception, SystemExit), result.exception  # no traceback
    if code is not None:
        assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.output
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]


@pytest.fixture(scope="module")
def run(tiny_cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    result = succeed(train, "--shards", tiny_cache, "--out", out, *assigned(*FAST), "--device", "cpu")
    assert f"{out}: 1 epochs, " in result.stdout
    assert "best held-out PGD accuracy" in result.stdout
    assert "epoch 1/1, loss " in result.stderr
    assert "GiB of 8 GiB, resident in memory" in result.stderr
    return out


def test_a_cache_beyond_the_memory_is_streamed_and_that_is_said(fine_cache, tmp_path):
    words = ["--shards", fine_cache, "--out", tmp_path / "run", "--device", "cpu", "--memory", "0.000045"]
    result = succeed(train, *words, *assigned(*FAST, "optim.batch_size=4"))
    assert "do not fit" in result.stderr and "streamed in windows of 32 rows" in result.stderr, result.stderr


def test_a_pattern_of_tars_that_lacks_one(fine_cache, tmp_path):
    export_webdataset(open_cache(fine_cache), tmp_path / "tars", "blocks")
    pattern = f"{tmp_path}/tars/shard-{{00000..00005}}.tar"
    line = fail(train, "--shards", pattern, "--out", tmp_path / "run", "--device", "cpu")
    assert "does not name the 7 tars" in line and "lacks shard-00006.tar" in line


LEFT = [CARD, WEIGHTS, "training/curves.png", "training/log.csv", "training/log.jsonl", "training/run.json"]


def left(folder):
    """The files of a teacher's folder, but for what TensorBoard writes where it is installed."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path) for path in files if "tensorboard" not in path.parts)


TEACHER = ("--data", "digits", "--arch", "resnet18", "--device", "cpu")
TEACHER_FAST = assigned("optim.epochs=1", "optim.batch_size=64", "inner.steps=1", "views.padding=1", "views.flip=false")


def test_train_a_teacher_and_check_it(tmp_path):
    out, options = tmp_path / "teacher", ("--kwargs", SMALL, "--limit", 128, "--test-limit", 40, "--out")
    result = succeed(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST)
    assert f"{out}: clean" in result.stdout
    assert "PGD-20 at 8/255" in result.stdout
    assert "(40 test images)" in result.stdout
    card = read_card(out)
    assert card.training["algorithm"] == "pgd-at"
    assert card.accuracy["digits test"]["rows"] == 40
    load_teacher(out, CPU)

    check = (
        "check",
        out,
        "--data",
        "digits",
        "--device",
        "cpu",
        "--split",
        "train",
        "--limit",
        50,
        "--eps",
        4,
        "--allow",
        "teacher",
    )
    assert "(50 train images)" in succeed(teacher, *check).stdout
    assert read_card(out).accuracy["digits train"]["eps"] == 4
    assert "is not empty" in fail(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST)


def test_a_finished_teacher_is_left_as_it_is(tmp_path):
    """A script that asks for `--resume` from the start can run again, as with a student."""
    out, options = tmp_path / "teacher", ("--kwargs", SMALL, "--limit", 128, "--test-limit", 40, "--resume", "--out")
    succeed(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir() if path.is_file()}
    again = succeed(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST)
    assert again.stdout == f"{out}: trained and measured before\n"
    other = fail(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST, "--set", "inner.eps=4")
    assert (
        "holds another teacher: training.eps: 8.0 -> 4.0; training.inner.eps: 8.0 -> 4.0; choose another --out folder"
        in other
    )
    assert {name: ((out / name).read_bytes(), (out / name).stat().st_mtime_ns) for name in before} == before
    (out / WEIGHTS).write_bytes(before[WEIGHTS][0][:-4] + b"gone")
    assert "not these weights" in fail(teacher, "train", *TEACHER, *options, out, *TEACHER_FAST)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_a_teacher_that_ctrl_c_stops_is_gone_on_with(tmp_path, monkeypatch):
    """SIGINT within a step: the step is finished and kept, and the weights are the same in the end."""
    options = (*TEACHER, "--kwargs", SMALL, "--limit", 256, "--test-limit", 40, *TEACHER_FAST, "--out")
    succeed(teacher, "train", *options, tmp_path / "whole")
    take_step, steps = trainer.take_step, []

    def interrupted(*arguments):
        if len(steps) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        steps.append(0)
        take_step(*arguments)

    monkeypatch.setattr(trainer, "take_step", interrupted)
    stopped = call(teacher, "train", *options, tmp_path / "cut")
    monkeypatch.undo()
    assert stopped.exit_code == 130 and len(steps) == 2
    assert "stopping at the end of this step" in stopped.stderr
    assert "--resume goes on with it" in fail(teacher, "train", *options, tmp_path / "cut")
    again = shlex.split(stopped.stderr.strip().splitlines()[-1].removeprefix("go on with: darht-teacher "))
    succeed(teacher, *again)
    assert left(tmp_path / "cut") == LEFT
    assert read_card(tmp_path / "cut").weights_sha256 == read_card(tmp_path / "whole").weights_sha256


def test_a_teacher_that_is_stopped_while_it_is_measured(tmp_path, monkeypatch):
    options = (*TEACHER, "--kwargs", SMALL, "--limit", 64, "--test-limit", 40, *TEACHER_FAST, "--out", tmp_path / "cut")

    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check_teacher", interrupted)
    stopped = call(teacher, "train", *options)
    monkeypatch.undo()
    assert stopped.exit_code == 130 and "go on with: darht-teacher train" in stopped.stderr
    assert "PGD-20 at 8/255" in succeed(teacher, "train", *options, "--resume").stdout
    assert left(tmp_path / "cut") == LEFT
    assert read_card(tmp_path / "cut").accuracy["digits test"]["rows"] == 40


def test_the_command_that_goes_on_has_flags_and_repeated_options():
    words = [
        "--data",
        "cifar10",
        "--download",
        "--arch",
        "resnet18",
        "--set",
        "inner.eps=4",
        "--set",
        "inner.steps=5",
        "--out",
        "a b",
    ]
    ctx = teacher.commands["train"].make_context("train", list(words))
    again = shlex.split(command_again(ctx, "darht-teacher", "train"))
    assert again[:2] == ["darht-teacher", "train"] and again[-1] == "--resume"
    assert sorted(again[2:-1]) == sorted(words)


def test_import_foreign_weights(tmp_path):
    net = build("resnet18", 10, json.loads(SMALL))
    torch.save({"state_dict": {f"module.{name}": value for name, value in net.state_dict().items()}}, tmp_path / "w.pt")
    options = ("--arch", "resnet18", "--kwargs", SMALL, "--mean", "0.5,0.5,0.5", "--std", "0.2,0.2,0.2", "--out")
    result = succeed(teacher, "import", tmp_path / "w.pt", *options, tmp_path / "new")
    assert result.stdout.startswith(f"{tmp_path / 'new'}: resnet18, 10 classes, weights ")
    loaded, card = load_teacher(tmp_path / "new", CPU)
    assert card.preprocessing.mean == (0.5, 0.5, 0.5)
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(loaded(x), net.eval()((x - 0.5) / 0.2))
    assert "is not empty" in fail(teacher, "import", tmp_path / "w.pt", *options, tmp_path / "new")


def test_weights_that_do_not_fit_are_listed(tmp_path):
    state = build("resnet18", 10, json.loads(SMALL)).state_dict()
    state["extra"] = state.pop("linear.bias")
    torch.save(state, tmp_path / "w.pth")
    said = fail(
        teacher, "import", tmp_path / "w.pth", "--arch", "resnet18", "--kwargs", SMALL, "--out", tmp_path / "new"
    )
    assert "1 missing: linear.bias; 1 unexpected: extra" in said
    assert not (tmp_path / "new").exists()


def test_a_web_page_saved_as_weights_is_named_as_such(tmp_path):
    (tmp_path / "w.pt").write_text("<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    said = fail(teacher, "import", tmp_path / "w.pt", "--arch", "resnet18", "--out", tmp_path / "new")
    assert "is a web page, not weights" in said


def test_a_run_is_resumed_and_not_overwritten(run, tiny_cache):
    arguments = ("--shards", tiny_cache, "--out", run, "--device", "cpu")
    assert "add --resume" in fail(train, *arguments, *assigned(*FAST))
    assert "1 epochs" in succeed(train, *arguments, *assigned(*FAST), "--resume").stdout
    assert "recipe.seed: 0 -> 1" in fail(train, *arguments, *assigned(*FAST, "seed=1"), "--resume")


def test_live_teachers_and_what_is_noted(tiny_cache, tiny_teachers, tmp_path):
    arguments = ("--shards", tiny_cache, "--device", "cpu", *assigned(*FAST, "teachers=live", "loss.phases=[0, 0]"))
    result = succeed(train, *arguments, "--out", tmp_path / "run", "--teacher", f"cnn={tiny_teachers['cnn']}")
    assert "GiB of 8 GiB, resident in memory" in result.stderr
    said = fail(train, *arguments, "--out", tmp_path / "other", "--teacher", f"cnn={tiny_teachers['vit']}")
    assert "is not teacher 'cnn' of the cache: arch" in said and "give --teacher cnn=FOLDER" in said
    for words in (("cnn",), ("=x",), ("cnn=",), ("cnn=a", "cnn=b")):
        given = [word for item in words for word in ("--teacher", item)]
        said = fail(train, *arguments, "--out", tmp_path / "other", *given)
        assert said == f"error: --teacher reads NAME=FOLDER, each name once; got {', '.join(words)}"
    assert "set teachers: live" in fail(
        train, "--shards", tiny_cache, "--out", tmp_path / "other", "--teacher", "cnn=x", "--device", "cpu"
    )
    assert not (tmp_path / "other").exists()
    assert "live teachers" in succeed(evaluate, tmp_path / "run", "--limit", 40, "--no-transfer").stdout


def test_a_recipe_file(tiny_cache, tmp_path):
    recipe = {
        "recipe": "rslad",
        "inner": {"kind": "cached", "eps": 32},
        "optim": {"epochs": 1, "batch_size": 32},
        "student": {"kwargs": json.loads(SMALL)},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    succeed(train, "--shards", tiny_cache, "--out", out, "--recipe", tmp_path / "r.yaml", "--device", "cpu")
    identity = json.loads((out / "run.json").read_text())["identity"]
    assert identity["recipe"]["recipe"] == "rslad"
    assert identity["recipe"]["inner"]["kind"] == "cached"


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("optim.epoch=1", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("inner.eps=0.03", "eps is in whole pixel levels of 255; got 0.03, which is 7.65 levels: write eps: 8"),
        ("recipe=sard", "recipe must be one of darht, rslad, ard, mtard, adaad, saad, kd, at, trades, adr; got 'sard'"),
        ("loss.tau=4", "loss of recipe darht: unknown key 'tau'"),
        ("optim.lr", "an assignment reads key=value"),
        ("student.arch=resnet19", "unknown architecture 'resnet19'; did you mean 'resnet18'?"),
        ("student.kwargs.widht=8", "does not know widht; its kwargs are"),
    ],
)
def test_a_mistake_in_a_recipe(assignment, part, tiny_cache, tmp_path):
    arguments = ("--shards", tiny_cache, "--out", tmp_path / "run", "--device", "cpu")
    assert part in fail(train, *arguments, *assigned(*FAST, assignment))
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_recipe_file(tiny_cache, tmp_path):
    arguments = ("--shards", tiny_cache, "--out", tmp_path / "run", "--device", "cpu", "--recipe")
    assert "cannot read" in fail(train, *arguments, tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_text("recpie: darht\n")
    said = fail(train, *arguments, tmp_path / "r.yaml")
    assert said == "error: r.yaml: unknown key 'recpie'; did you mean 'recipe'?"


def test_epsilon_of_a_check(tiny_teachers, tmp_path):
    folder = shutil.copytree(tiny_teachers["cnn"], tmp_path / "cnn")
    arguments = ("check", folder, "--data", "digits", "--limit", 40, "--device", "cpu", "--allow", "cnn", "--eps")
    assert "0.03 is 7.6 levels as a share of 1: write 8 or 8/255" in fail(teacher, *arguments, 0.03)
    assert succeed(teacher, *arguments, "4/255").stdout.startswith("eps 4 levels = 0.0157\n")
    assert read_card(folder).accuracy["digits test"]["eps"] == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("command", ["teacher", "train", "evaluate"])
def test_a_cuda_device_that_is_not_there(command, run, tiny_cache, tiny_teachers, tmp_path):
    commands = {
        "teacher": (teacher, "check", tiny_teachers["cnn"], "--data", "digits"),
        "train": (train, "--shards", tiny_cache, "--out", tmp_path / "run"),
        "evaluate": (evaluate, run),
    }
    said = fail(*commands[command], "--device", "cuda")
    assert said == "error: device cuda is not there: torch sees 0 CUDA devices; use --device cpu or auto"


def test_an_unsealed_cache(tiny_cache, tmp_path):
    folder = shutil.copytree(tiny_cache, tmp_path / "cache")
    (folder / "manifest.json").unlink()
    said = fail(train, "--shards", folder, "--out", tmp_path / "run", "--device", "cpu", code=None)
    assert "is not sealed" in said
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_cache(tmp_path):
    assert "is not a cache" in fail(train, "--shards", tmp_path, "--out", tmp_path / "run", "--device", "cpu")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--kwargs", "{width: 4}"), "--kwargs must be JSON, such as '{\"width\": 16}'; got '{width: 4}'"),
        (("--kwargs", "[4]"), "--kwargs must be a JSON mapping; got '[4]'"),
        (("--kwargs", '{"widht": 4}'), "resnet18 does not know widht"),
        (("--set", "algorithm=madry"), "must be one of standard, pgd-at, trades, fat; got 'madry'"),
        (("--set", "inner.eps=0.03"), "write eps: 8"),
        (("--set", "eps=4"), "--set eps is called inner.eps now: write --set inner.eps=4"),
        (("--algorithm", "fat", "--inner", "warm"), "algorithm fat has inner.kind: fat; got warm"),
        (("--inner", "fat", "--set", "inner.tau=-1"), "inner.tau counts steps of inner.kind: fat, 0 or more; got -1"),
        (("--algorithm", "standard", "--set", "loss.clean_share=0"), "standard is loss.clean_share: 1; leave it out"),
        (("--set", "holdout=1"), "holdout is a share in [0, 1); got 1"),
        (("--set", "algoritm=fat"), "unknown key 'algoritm'; did you mean 'algorithm'?"),
        (("--limit", "3"), "have no images in the train split of digits"),
        (("--root", "somewhere"), "comes with scikit-learn and reads no folder"),
    ],
)
def test_a_mistake_in_teacher_train(options, part, tmp_path):
    assert part in fail(teacher, "train", *TEACHER, "--out", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--kwargs", "nothing"), "--kwargs must be JSON"),
        (("--mean", "a,b,c"), "--mean must be three numbers with commas between them; got 'a,b,c'"),
        (("--std", "1,1"), "--std must be three numbers with commas between them; got '1,1'"),
    ],
)
def test_a_mistake_in_teacher_import(options, part, tmp_path):
    torch.save(build("resnet18", 10, json.loads(SMALL)).state_dict(), tmp_path / "w.pt")
    arguments = ("import", tmp_path / "w.pt", "--arch", "resnet18", "--out", tmp_path / "new")
    kwargs = () if "--kwargs" in options else ("--kwargs", SMALL)
    assert part in fail(teacher, *arguments, *kwargs, *options)


def test_teacher_import_takes_what_the_file_says(tmp_path):
    net = build("resnet18", 12, json.loads(SMALL))
    inside = {"mean": torch.full((3,), 0.5), "std": torch.full((3,), 0.25)}
    torch.save({"model": net.state_dict() | inside, "ema": net.state_dict()}, tmp_path / "w.pt")
    words = ("import", tmp_path / "w.pt", "--arch", "resnet18", "--kwargs", SMALL)
    said = succeed(teacher, *words, "--out", tmp_path / "new").stdout
    assert "the file's own normalisation is used, mean 0.5,0.5,0.5 and std 0.25,0.25,0.25 (mean)" in said
    assert "--weights ema takes them" in said and "resnet18, 12 classes" in said
    succeed(teacher, *words, "--weights", "ema", "--out", tmp_path / "ema")
    assert "write --mean 0.490196,0.482353,0.443137" in fail(
        teacher, *words, "--mean", "125,123,113", "--out", tmp_path / "no"
    )


def test_teacher_import_finds_python_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "nets_typed_here.py").write_text(
        "from torch import nn\n\n\ndef make():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    said = succeed(teacher, "import", "--arch", "python:nets_typed_here:make", "--out", tmp_path / "new").stdout
    assert "4 classes" in said


def test_training_finds_python_that_is_typed_in_the_current_folder(tiny_cache, tmp_path, monkeypatch):
    (tmp_path / "nets_trained_here.py").write_text("number = 3\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    missing, out = "python:nets_trained_here:make", ("--out", tmp_path / "new", "--device", "cpu")
    teach = ("train", "--data", "digits", "--arch", missing, *assigned("optim.batch_size=60"), "--limit", 60)
    assert "has no callable 'make'" in fail(teacher, *teach, *out)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    student = ("--shards", tiny_cache, "--recipe", "at", *assigned("optim.batch_size=8", f"student.arch={missing}"))
    assert "has no callable 'make'" in fail(train, *student, *assigned("student.feature_map=false"), *out)


def test_a_teacher_that_does_not_take_the_images(tiny_teachers, tmp_path):
    arguments = ("train", "--data", "digits", "--arch", "timm:vit_tiny_patch16_224", "--device", "cpu")
    options = ("--limit", 60, *assigned("optim.batch_size=60"), "--out", tmp_path / "new")
    said = fail(teacher, *arguments, "--kwargs", '{"depth": 1}', *options)
    assert "does not take images of 8x8 pixels" in said


def test_help_imports_no_torch():
    code = (
        "import sys, click.testing, darht.trainer.cli as cli\n"
        "for command in ([cli.teacher], [cli.teacher, 'train'], [cli.teacher, 'import'], [cli.teacher, 'check'],\n"
        "                [cli.train], [cli.train, 'run'], [cli.train, 'export'], [cli.evaluate]):\n"
        "    result = click.testing.CliRunner().invoke(command[0], [*command[1:], '--help'])\n"
        "    assert result.exit_code == 0 and 'Usage' in result.output, result.output\n"
        "print([name for name in ('torch', 'zarr', 'timm', 'torchvision', 'sklearn') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_transfer_between_teachers(tiny_teachers, tmp_path):
    words = [*map(str, tiny_teachers.values()), "--data", "digits", "--count", 20, "--eps", "8/255", "--attack", "pgd"]
    result = succeed(teacher, "transfer", *words, "--out", tmp_path / "out", "--device", "cpu")
    assert "made on" in result.stdout and "per cent still right" in result.stdout
    written = json.loads((tmp_path / "out" / "transfer.json").read_text())
    assert written["names"] == ["cnn", "vit"] and written["attacks"][0]["eps"] == 8
    assert (tmp_path / "out" / "transfer.png").is_file() and (tmp_path / "out" / "transfer.md").is_file()


def test_mistakes_of_transfer_are_told_at_once(tiny_teachers, tmp_path):
    cnn = tiny_teachers["cnn"]
    said = fail(teacher, "transfer", cnn, cnn, "--data", "digits", "--attack", "pdg", "--out", tmp_path / "out")
    assert "two teachers are called 'cnn'; unknown attack 'pdg'; known are pgd, fgsm" in said
