"""examples/: the data are what they claim to be, the demo writes its page, and an interrupted run loses nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("lightning", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("matplotlib", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("skimage", reason="the examples need pip install dsc_ops[examples]")

from dsc_ops import functional
from examples import demo
from examples.data import digits, photographs, sampling
from examples.networks import Denoiser, LeNet5, dct_atoms

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and console of Python in the checkout; on one thread, which other work on the machine slows least."""
    command = [sys.executable, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600
    )
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def fast_run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and console of one whole fast run."""
    folder = tmp_path_factory.mktemp("demo") / "runs"
    status, console = run("-m", "examples.demo", "--fast", "--output", str(folder))
    assert status == 0, console
    return folder, console


# --------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("name", photographs.TRAINING_PHOTOGRAPHS + photographs.TEST_PHOTOGRAPHS)
def test_a_photograph_is_grey_and_in_range(name):
    picture = photographs.photograph(name)
    assert picture.dtype == torch.float32 and picture.dim() == 3 and picture.shape[0] == 1
    assert min(picture.shape[1:]) >= 96
    assert picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.01


def test_a_colour_photograph_has_three_channels_and_a_grey_one_is_refused():
    assert photographs.photograph("coffee.png", colour=True).shape == (3, 400, 600)
    with pytest.raises(ValueError, match=r"camera\.png.*grey"):
        photographs.photograph("camera.png", colour=True)


def test_training_and_test_photographs_have_nothing_in_common():
    assert not set(photographs.TRAINING_PHOTOGRAPHS) & set(photographs.TEST_PHOTOGRAPHS)
    assert len(set(photographs.TRAINING_PHOTOGRAPHS + photographs.TEST_PHOTOGRAPHS)) == 15


def test_noisy_crops_depend_on_the_index_alone_and_have_the_noise_asked_for():
    crops = photographs.NoisyCrops([photographs.photograph("coins.png")], 64, 0.1)
    noisy, clean = crops[5]
    assert noisy.shape == clean.shape == (1, 64, 64)
    assert all(map(torch.equal, crops[5], (noisy, clean)))
    assert not torch.equal(crops[6][1], clean)
    assert float((noisy - clean).std()) == pytest.approx(0.1, rel=0.05)
    assert clean.min() >= 0 and clean.max() <= 1


def test_an_epoch_has_seeds_or_an_order_of_its_own():
    seeds, shuffled = sampling.FreshSeeds(10, 3), sampling.Shuffled(10, 3)
    first, order = list(seeds), list(shuffled)
    assert list(seeds) == first and list(shuffled) == order and sorted(order) == list(range(10))
    seeds.set_epoch(1)
    shuffled.set_epoch(1)
    assert not set(seeds) & set(first)
    assert list(shuffled) != order and sorted(shuffled) == list(range(10))


def test_digits_are_5000_labelled_pictures_split_by_class():
    images, labels = digits.digits()
    assert images.shape == (5000, 1, 28, 28) and images.dtype == torch.float32
    assert images.min() == 0 and images.max() == 1
    assert labels.bincount().tolist() == [500] * 10
    training, test = digits.split_digits(labels, 0.2, seed=0)
    assert len(training) == 4000 and labels[test].bincount().tolist() == [100] * 10
    assert not set(training.tolist()) & set(test.tolist())
    assert not torch.equal(test, digits.split_digits(labels, 0.2, seed=1)[1])


# ----------------------------------------------------------------------------------------------------------- networks


def test_cosines_have_unit_norm_and_orthonormal_ones_make_a_tight_frame():
    atoms = dct_atoms(8, 7)
    assert atoms.shape == (64, 1, 7, 7)
    assert atoms.flatten(1).norm(dim=1).allclose(torch.ones(64))
    assert atoms[1:].sum(dim=(1, 2, 3)).abs().max() < 1e-5
    square = dct_atoms(5, 5).flatten(1)
    assert (square @ square.T).allclose(torch.eye(25), atol=1e-6)


def test_the_untrained_denoiser_is_ista_on_its_dictionary():
    network = Denoiser(3, 0.15)
    noisy = torch.rand(2, 1, 20, 24)
    level = noisy.mean(dim=(1, 2, 3), keepdim=True)
    dictionary = network.code.dictionary.detach()
    theta = float(network.code.theta[0, 0].detach())
    step = 1 / float(network.code.lipschitz().detach())
    codes = functional.ista(noisy - level, dictionary, theta / step, iterations=3, step=step, padding=6)
    restored = level + functional.synthesis(codes, dictionary, (20, 24), padding=6)
    assert step == pytest.approx(1, rel=1e-3)
    assert network(noisy).allclose(restored, atol=1e-5)


def test_lenet_has_the_sizes_of_the_paper_and_blocks_to_penalise():
    network = LeNet5(in_channels=1, size=28)
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(parameter.numel() for parameter in network.parameters()) == 44426
    assert set(LeNet5.BLOCKS) <= {name for name, _ in network.named_modules()}


# --------------------------------------------------------------------------------------------------------------- demo


class Page(HTMLParser):
    """What a page names: tags, addresses, classes; and whether its tags are closed in order."""

    VOID = ("meta", "img")

    def __init__(self, text: str):
        super().__init__()
        self.counts, self.addresses, self.open = {}, [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_complete_and_needs_nothing_else(fast_run):
    text = (fast_run[0] / "index.html").read_text()
    page = Page(text)
    assert not page.open
    assert page.counts["table"] == 4  # one for each step, and the machine
    assert page.counts["img"] == len(page.addresses) == 16 + 2 + 1 + 2 + 1
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    for words in ("camera", "LISTAConv, trained", "gamma = 0.05, mean", "stem-cifar", torch.__version__, "--fast"):
        assert words in text


def test_pictures_lie_beside_the_page(fast_run):
    for name in ("denoise", "atoms-learned", "denoise-loss", "digits-density", "timing", "camera-network"):
        assert (fast_run[0] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(fast_run[0].rglob("*.unfinished"))


def test_the_console_tells_the_goals_and_warns_of_nothing(fast_run):
    console = fast_run[1]
    assert re.search(r"^(met   |MISSED)  The network gains .* dB over the best ISTA", console, re.MULTILINE)
    assert "denoiser, epoch 6/6" in console and str(fast_run[0] / "index.html") in console
    assert "arning" not in console and "Traceback" not in console


# The demo, with a signal to itself in the middle of the fourth of six epochs of ten steps.
STOPPED = """
import signal, sys
from examples import demo, training

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

take_step = training.Learner.training_step

def training_step(learner, batch, index):
    if learner.global_step == 35:
        signal.raise_signal(signal.Signals[sys.argv[1]])
    return take_step(learner, batch, index)

training.Learner.training_step = training_step
sys.exit(demo.main(sys.argv[2:]))
"""


def stopped_run(folder: Path, stop: str) -> tuple[tuple[str, ...], int, str]:
    """Arguments, status and console of a run that a signal ends; its last whole epoch was the third."""
    arguments = ("--fast", "--steps", "denoise", "--output", str(folder))
    status, console = run("-c", STOPPED, stop, *arguments)
    assert not (folder / "denoise" / "results.json").exists()
    checkpoint = torch.load(folder / "denoise" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 30, console
    return arguments, status, console


def test_an_interrupted_run_says_how_to_go_on(tmp_path):
    _, status, console = stopped_run(tmp_path / "runs", "SIGINT")
    assert status == 1 and "Traceback" not in console
    assert "\nInterrupted. The same command goes on from the last checkpoint.\n" in console


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_the_same(fast_run, tmp_path):
    folder = tmp_path / "runs"
    arguments, stopped, console = stopped_run(folder, "SIGKILL")
    assert stopped == -signal.SIGKILL, console

    status, console = run("-m", "examples.demo", *arguments)
    assert status == 0, console
    assert "going on from the checkpoint of step 30" in console
    assert "denoiser, epoch 3/6" not in console and "denoiser, epoch 4/6" in console
    weights, uninterrupted = (
        torch.load(path / "denoise" / "weights.pt", weights_only=True) for path in (folder, fast_run[0])
    )
    assert weights.keys() == uninterrupted.keys()
    assert all(torch.equal(weights[key], uninterrupted[key]) for key in weights)
    one, other = (json.loads((path / "denoise" / "results.json").read_text()) for path in (folder, fast_run[0]))
    assert one["losses"] == other["losses"] and one["psnr"] == other["psnr"]


def test_finished_steps_are_not_run_again_unless_the_settings_differ(fast_run, monkeypatch, capsys):
    from examples import steps

    ran = []
    monkeypatch.setattr(steps, "timing", lambda settings, seed, folder: ran.append(seed) or {"results": []})
    monkeypatch.setattr("examples.demo_report.text", lambda step, results: "")
    monkeypatch.setattr("examples.demo_report.write", lambda folder, results, fast: folder / "index.html")
    arguments = ["--fast", "--output", str(fast_run[0])]
    assert demo.main(arguments) == 0
    assert not ran and capsys.readouterr().out.count("finished before") == 3
    assert demo.main([*arguments, "--steps", "timing", "--seed", "1"]) == 0
    assert demo.main([*arguments, "--steps", "timing", "--seed", "1", "--restart"]) == 0
    assert ran == [1, 1]


def test_a_missed_goal_is_told_and_is_the_exit_status(tmp_path, monkeypatch, capsys):
    scores = {"noisy": [20.0], "ista": [28.0], "network": [28.5]}
    monkeypatch.setattr(demo, "run_step", lambda step, options: {"psnr": scores})
    monkeypatch.setattr("examples.demo_report.text", lambda step, results: "")
    monkeypatch.setattr("examples.demo_report.write", lambda folder, results, fast: folder / "index.html")
    assert demo.main(["--steps", "denoise", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "met     The network gains 8.50 dB over the noisy photographs" in printed
    assert "MISSED  The network gains 0.50 dB over the best ISTA" in printed
    scores["network"] = [29.5]
    assert demo.main(["--steps", "denoise", "--output", str(tmp_path)]) == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    precious = tmp_path / "denoise" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("...")
    with pytest.raises(SystemExit, match="choose another --output"):
        demo.main(["--fast", "--restart", "--steps", "denoise", "--output", str(tmp_path)])
    assert precious.exists()


@pytest.mark.supports("faults", "damaged checkpoints, settings and results are named, with what to do")
def test_damaged_files_are_named_with_what_to_do(tmp_path):
    from examples import training

    folder = tmp_path / "denoise"
    folder.mkdir()
    (folder / "settings.json").write_text('{"settings": {"ste')
    with pytest.raises(SystemExit, match=r"settings\.json is damaged \(.*\): --restart makes it again"):
        demo.main(["--fast", "--steps", "denoise", "--output", str(tmp_path)])
    checkpoint = folder / "last.ckpt"
    torch.save({"global_step": 7}, checkpoint)
    assert training.step_of(checkpoint) == 7
    whole = checkpoint.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], whole.replace(b"global_step", b"local__step")):
        checkpoint.write_bytes(content)
        with pytest.raises(SystemExit, match=r"last\.ckpt is damaged \(.+\): remove it, and the training begins anew"):
            training.step_of(checkpoint)


def test_help_explains_every_step(capsys):
    with pytest.raises(SystemExit) as end:
        demo.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert all(" ".join(text.split()) in printed for text in demo.STEPS.values())


def test_a_missing_extra_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr("examples.find_spec", lambda name: None if name == "mlxtend" else object())
    with pytest.raises(SystemExit, match=r"need mlxtend.*pip install dsc_ops\[examples\]"):
        demo.main([])
