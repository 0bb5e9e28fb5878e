"""The convolutional sparse coding networks of the examples: definitions, configs, training, robust inference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("jsonargparse", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("lightning", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("matplotlib", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("mlxtend", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("skimage", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("tensorboard", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("torchmetrics", reason="the examples need pip install dsc_ops[examples]")
pytest.importorskip("torchvision", reason="the examples need pip install dsc_ops[examples]")

import torchvision
import yaml
from torch import Tensor, nn

from benchmarks.machine import commit
from benchmarks.timing import torch_threads
from dsc_ops import functional
from dsc_ops.layers.csc import CSCConv, reference
from examples import csc_tables, networks, report, robust, robust_inference, train
from examples.cli import CONFIGS
from examples.networks import MSDCSC, CSCNet, MLCSCNet, MSDCSCBlocks, ResCSC, SDNet
from examples.tasks import Task
from examples.training import cosine, falling

pytestmark = [
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with torch_threads(1):
        yield


@pytest.fixture
def shapes_alone(monkeypatch):
    """Networks on the meta device, without the eigenvalues that their start asks for."""
    monkeypatch.setattr(CSCConv, "find_step", lambda layer: None)
    monkeypatch.setattr(functional, "lipschitz", lambda dictionary, size, **geometry: dictionary.new_ones(()))
    with torch.device("meta"):
        yield


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("layers", "paper"), [(20, 0.27), (56, 0.85), (110, 1.7), (218, 3.4)])
def test_res_csc_has_the_parameters_of_the_paper(layers, paper, shapes_alone):
    resnet, ours = ResCSC(layers, "resnet"), ResCSC(layers)
    assert count(ours) / 1e6 == pytest.approx(paper, rel=0.025)  # 3.48 is 3.4 in the paper
    assert count(ours) - count(resnet) == (layers - 2) // 2  # c of each pair


def test_other_networks_have_as_many_parameters_as_their_definitions(shapes_alone):
    for layers, theirs in ((18, torchvision.models.resnet18()), (34, torchvision.models.resnet34())):
        assert count(SDNet(layers, stem="imagenet", classes=1000)) == count(theirs)
    assert count(SDNet(18)) == count(SDNet(18, "all")) == 11_173_962  # ResNet-18 for CIFAR, as is well known
    blocks, dense = MSDCSCBlocks(), MSDCSC(6)
    deep, six = MLCSCNet("cifar"), MLCSCNet("six", unfoldings=2)
    assert count(CSCNet()) == 3 * 175 * 121 + 175
    assert blocks.fc.in_features == 448 and [blocks.get_submodule(f"transition{k}").in_channels for k in (1, 2)] == [
        160,
        304,
    ]
    assert dense.fc.in_features == 3 + 6 * 32
    assert [s for block in (dense.block1, dense.block2, dense.block3) for s in block.dilations] == [1, 2, 3, 1, 2, 3]
    # Six convolutions and a classifier; a step c for each dictionary.
    pairs = [(3, 32, 4), (32, 64, 4), (64, 128, 4), (128, 256, 3), (256, 512, 3), (512, 512, 3)]
    plain = sum(n * (c * k**2 + 1) for c, n, k in pairs) + 512 * 10 + 10
    assert count(deep) == plain + 3 and count(six) == plain + 6


TINY = {
    "sdnet": lambda: SDNet(10, width=2),
    "sdnet-all": lambda: SDNet(10, "all", width=2),
    "sdnet-all-no-shortcut": lambda: SDNet(10, "all", False, width=2),
    "sdnet-imagenet": lambda: SDNet(10, stem="imagenet", width=2),
    "resnet": lambda: SDNet(10, "none", width=2),
    **{
        f"mlcsc-{method}": lambda method=method: MLCSCNet("cifar", method, 2, width=0.05)
        for method in ("ml-ista", "ml-fista", "ml-lista", "layered-ista")
    },
    "mlcsc-six": lambda: MLCSCNet("six", "ml-ista", 1, width=0.05),
    **{kind: lambda kind=kind: ResCSC(8, kind, width=2) for kind in ("res-csc", "simplified", "resnet", "plain")},
    "msdnet": lambda: MSDCSC(3, width=2),
    "msdcsc": lambda: MSDCSC(6, 2, "fista", width=2),
    "msdcsc-blocks": lambda: MSDCSCBlocks(growth=1),
}


@pytest.mark.parametrize("name", TINY)
def test_a_training_step_reaches_every_parameter(name):
    torch.manual_seed(0)
    network, images = TINY[name](), torch.randn(4, 3, 32, 32)
    for feature in network.FEATURES:
        network.get_submodule(feature)
    logits = network(images)
    assert logits.shape == (4, 10)
    loss = F.cross_entropy(logits, torch.arange(4))
    loss.backward()
    assert loss.isfinite()
    for label, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), label
    torch.optim.SGD(network.parameters(), lr=1e-3).step()
    assert network(images).isfinite().all()


def test_mnist_networks_take_digits():
    assert MLCSCNet("mnist", width=0.05)(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_networks_refuse_what_they_cannot_take():
    with pytest.raises(ValueError, match="layers is 50, it takes one of 10, 18, 34"):
        SDNet(50)
    with pytest.raises(ValueError, match="coded is 'first', it takes one of none, stem, all"):
        SDNet(coded="first")
    with pytest.raises(ValueError, match="version is 'svhn', it takes one of mnist, cifar, six"):
        MLCSCNet("svhn")
    with pytest.raises(ValueError, match=r"layers is 21, it takes 6 n \+ 2"):
        ResCSC(21)
    with pytest.raises(ValueError, match="depth is 7, it takes a multiple of 3"):
        MSDCSC(7)
    with pytest.raises(ValueError, match="stride is 8, it takes at most the kernel's 5"):
        CSCNet(4, 5, 8)


# ------------------------------------------------------------------------------------------- against plain writings


def assert_close(ours: Tensor, plain: Tensor) -> None:
    assert float((ours - plain).detach().norm() / plain.detach().norm()) < 1e-8


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)


def test_without_coding_it_is_torchvisions_resnet(images):
    theirs = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).double()
    ours = SDNet(10, "none", stem="imagenet").double()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    assert_close(ours.eval()(images[:1]), theirs.eval()(images[:1]))


@pytest.mark.parametrize("coded", ["stem", "all"])
@pytest.mark.parametrize("shortcut", [True, False])
def test_sdnet_is_its_plain_writing(coded, shortcut, images):
    network = SDNet(10, coded, shortcut, width=2, iterations=3, lam=0.02).double().eval()
    for norm in (module for module in network.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)  # codes are >= 0: a ReLU would change nothing else

    def convolved(part: nn.Sequential, x: Tensor) -> Tensor:
        conv = part.conv
        if isinstance(conv, nn.Conv2d):
            return part.norm(conv(x))
        step = 0.9 / conv.lipschitz
        return part.norm(reference.csc_conv(x, conv.dictionary, 0.02, step, 3, conv.stride, conv.padding))

    with torch.no_grad():
        x = convolved(network.stem, images)
        for stage in range(1, 5):
            (block,) = network.get_submodule(f"stage{stage}")
            u = convolved(block.first, x)
            u = convolved(block.second, u if coded == "all" else u.relu())
            if shortcut:
                u = u + (x if isinstance(block.shortcut, nn.Identity) else convolved(block.shortcut, x))
            x = u.relu()
        assert_close(network(images), network.fc(x.mean((2, 3))))
    assert isinstance(network.stage2[0].first.conv, CSCConv) == (coded == "all")


@pytest.mark.parametrize("method", ["ml-ista", "ml-fista", "ml-lista", "layered-ista"])
def test_ml_csc_is_its_plain_writing(method, images):
    network = MLCSCNet("cifar", method, 2, width=0.1).double()
    layers = network.codes.layers
    for layer in layers:
        nn.init.normal_(layer.theta, std=0.01)
    dictionaries, biases = [layer.dictionary for layer in layers], [-layer.theta for layer in layers]
    analyses = [layer.analysis for layer in layers] if method == "ml-lista" else None
    with torch.no_grad():
        scales = [1.0] * 3
        x = reference.ml_csc(images, dictionaries, biases, scales, [(2, 1)] * 3, method, 2, analyses)[-1]
        for number in (4, 5, 6):
            conv = network.get_submodule(f"conv{number}")[0]
            x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
            x = F.max_pool2d(x, 2) if number > 4 else x
        assert_close(network(images), network.fc(x.flatten(1)))


@pytest.mark.parametrize("kind", ["res-csc", "simplified", "resnet", "plain"])
def test_res_csc_is_its_plain_writing(kind, images):
    network = ResCSC(14, kind, width=2).double().eval()
    with torch.no_grad():
        x = network.stem.norm(F.conv2d(images, network.stem.conv.weight, padding=1)).relu()
        for stage in (1, 2, 3):
            for number, block in enumerate(network.get_submodule(f"stage{stage}")):
                scale = 0.0 if block.scale is None else block.scale
                stride, shortcut = 2 if stage > 1 and not number else 1, kind in ("res-csc", "resnet")
                x = reference.res_csc(x, tuple(block.dictionaries), block.norms, scale, stride, shortcut)
        assert_close(network(images), network.fc(x.mean((2, 3))))


def dense(block: nn.Module, x: Tensor, unfoldings: int, fista: bool, dilations: list[int]) -> Tensor:
    """A new block in training, as published."""
    layers = block.layers
    norms = [[nn.BatchNorm2d(len(layer.bias)).double() for layer in layers] for _ in range(1 + unfoldings)]
    parts = ([getattr(layer, name) for layer in layers] for name in ("dictionary", "scale", "bias"))
    return reference.msd_csc(x, *parts, norms, dilations, unfoldings, fista)


@pytest.mark.parametrize(("unfoldings", "solver"), [(0, "ista"), (2, "ista"), (2, "fista")])
def test_msd_csc_is_its_plain_writing(unfoldings, solver, images):
    network = MSDCSC(6, unfoldings, solver, width=2).double()
    with torch.no_grad():
        x = dense(network.block1, images, unfoldings, solver == "fista", [1, 2])
        x = dense(network.block2, F.max_pool2d(x, 2), unfoldings, solver == "fista", [3, 1])
        x = dense(network.block3, F.max_pool2d(x, 2), unfoldings, solver == "fista", [2, 3])
        assert_close(network(images), network.fc(x.mean((2, 3))))


def test_the_authors_msd_csc_is_its_plain_writing(images):
    network, dilations = MSDCSCBlocks(growth=1).double(), [1, 2, 3, 4, 5, 6] * 2
    with torch.no_grad():
        stem = network.stem.conv
        x = nn.BatchNorm2d(16).double()(F.conv2d(images, stem.weight, stem.bias, padding=1)).relu()
        for number in (1, 2, 3):
            x = dense(network.get_submodule(f"block{number}"), x, 1, False, dilations)
            if number < 3:
                x = F.max_pool2d(F.conv2d(x, network.get_submodule(f"transition{number}").weight), 2)
        assert_close(network(images), network.fc(x.mean((2, 3))))


@pytest.mark.parametrize("size", [(12, 17), (9, 9)])
def test_cscnet_is_its_plain_writing(size):
    torch.manual_seed(0)
    network, stride, kernel = CSCNet(6, 5, 3, unfoldings=4, tau=0.02).double(), 3, 5
    with torch.no_grad():  # as after training: three dictionaries
        for weight in (network.code.analysis, network.decoder):
            weight += 0.1 * torch.randn_like(weight)
    noisy, (height, width) = torch.rand(2, 1, *size, dtype=torch.float64), size
    A, B, C, tau = network.code.dictionary, network.code.analysis, network.decoder, network.code.theta.view(1, -1, 1, 1)
    total = torch.zeros_like(noisy)
    with torch.no_grad():
        for top in range(1, stride + 1):
            for left in range(1, stride + 1):
                # Atoms cover the shifted picture to its right and lower edge, as far as the largest shift goes.
                bottom, right = (
                    next(m for m in range(99) if (n + stride + m - kernel) % stride == 0 and n + stride + m >= kernel)
                    + stride
                    - shift
                    for n, shift in ((height, top), (width, left))
                )
                y = F.pad(noisy, (left, right, top, bottom), mode="reflect")
                g = torch.zeros(())
                for step in range(4):
                    r = F.conv_transpose2d(g, A, stride=stride) - y if step else -y
                    u = g - F.conv2d(r, B, stride=stride)
                    g = u.sign() * (u.abs() - tau).relu()
                total += F.conv_transpose2d(g, C, stride=stride)[:, :, top : top + height, left : left + width]
        assert_close(network(noisy), total / stride**2)


def test_a_new_cscnet_is_ista_on_a_dictionary_of_unit_lipschitz():
    network = CSCNet(12, 5, 3, unfoldings=2)
    assert torch.equal(network.code.dictionary, network.decoder) and network.code.theta.unique().tolist() == [
        pytest.approx(0.01)
    ]
    assert network.code.analysis.allclose(network.code.dictionary, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------------- configs


@pytest.fixture(scope="module")
def instantiate():
    """Makes model and data of a row as examples.train would, but with one parser for all rows."""
    from lightning import LightningDataModule
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_lightning_class_args(Task, "model", subclass_mode=True)
    parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True)

    def make(row: str) -> tuple[SimpleNamespace, dict]:
        settings = yaml.safe_load((CONFIGS / f"{row}.yaml").read_text())
        trainer = settings.pop("trainer")
        return parser.instantiate_classes(parser.parse_object(settings)), trainer

    return make


EXPECTED = {  # network, learning rate, epochs
    "sdnet18-imagenet": ("SDNet", 0.1, 100),
    "sdnet34-imagenet": ("SDNet", 0.1, 100),
    "mlcsc-": ("MLCSCNet", 0.005, 150),
    "mlcsc6": ("MLCSCNet", 0.05, 150),
    "msdcsc-blocks": ("MSDCSCBlocks", 0.05, 150),
    "msd": ("MSDCSC", 0.05, 150),
    "sdnet": ("SDNet", 0.1, 220),
    "resnet1": ("SDNet", 0.1, 220),
    "resnet3": ("SDNet", 0.1, 220),
    "": ("ResCSC", 0.1, 200),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_config_makes_what_its_name_says(instantiate, shapes_alone):
    for row in set(csc_tables.ROWS) - {*csc_tables.DENOISERS}:
        made, trainer = instantiate(row)
        name, rate, epochs = next(value for start, value in EXPECTED.items() if row.startswith(start))
        network, digits = made.model.network, [int(part) for part in row.split("-") if part.isdigit()]
        assert type(network) is getattr(networks, name), row
        optimizer = made.model.optimizer([nn.Parameter(torch.zeros(1))])
        assert (optimizer.defaults["lr"], optimizer.defaults["momentum"], trainer["max_epochs"]) == (rate, 0.9, epochs)
        imagenet = row.endswith("imagenet")
        assert (made.model.schedule is cosine) == (name == "SDNet" and not imagenet)
        assert made.data.batch_size == (512 if imagenet else 128)
        if name == "MLCSCNet":
            method = row.removeprefix("mlcsc-").partition("-")[2] if row.startswith("mlcsc-") else ""
            assert network.codes.unfoldings == (digits[0] if row.startswith("mlcsc6") else 6 * (method != "cnn")), row
            assert row.endswith("cnn") or network.codes.method == (method or network.codes.method)
            assert ("fista" in row) == (network.codes.method == "ml-fista")
        elif name == "MSDCSC":
            depth = sum(len(block.dilations) for block in (network.block1, network.block2, network.block3))
            assert row.startswith(("msdnet", "msdcsc")) and row.partition("-")[0][6:] == str(depth)
            assert network.block1.unfoldings == (digits[0] if digits else 0)
            assert network.block1.solver == ("fista" if row.endswith("fista") else "ista")
        elif name == "ResCSC":
            kind = row.partition("-")[0]
            assert network.stage1[0].kind == {"rescsc": "res-csc"}.get(kind, kind)
            assert 6 * len(network.stage1) + 2 == digits[0]
        elif name == "SDNet":
            coded = [isinstance(module, CSCConv) for module in network.modules()]
            assert sum(coded) == (0 if row.startswith("resnet") else 1 if "all" not in row else sum(coded))
            assert (network.stem.conv.kernel_size == (7, 7)) == (network.fc.out_features == 1000) == imagenet
            assert [len(network.get_submodule(f"stage{k}")) for k in (1, 2, 3, 4)] == list(
                networks.sdnet.STAGES[int(row[5:7] if row.startswith("sdnet") else row[6:8])]
            )
            assert ("all" in row) == (sum(coded) > 1) and ("no-shortcut" in row) == (network.stage1[0].shortcut is None)
    made, trainer = instantiate("cscnet-25")
    assert made.model.network.decoder.shape == (175, 1, 11, 11) and made.data.sigma == pytest.approx(25 / 255)
    assert trainer["max_epochs"] == 250


def test_the_learning_rate_falls_in_steps():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = falling([0.5, 0.75], 0.1)(optimizer, 8), []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0] * 4 + [0.1] * 2 + [0.01] * 2)
    assert falling((), 0.1) is cosine
    with pytest.raises(ValueError, match=r"milestones is \[100\], it takes fractions of the training"):
        falling([100], 0.1)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder whose file of CIFAR-10 has noise in the first pictures; the rest is a hole."""
    folder = tmp_path_factory.mktemp("cifar")
    rows = np.lib.format.open_memmap(folder / "cifar-10.npy", "w+", np.uint8, (60000, 3073))
    random = np.random.default_rng(0)
    for start in (0, 50000):
        rows[start : start + 32] = random.integers(0, 256, (32, 3073))
        rows[start : start + 32, 0] %= 10
    rows.flush()
    return folder


def trained(row: str, output: Path, **options) -> Path:
    more = [
        f"--{'data' if name in ('root', 'limit', 'batch_size', 'crop', 'steps', 'test_crop') else 'model'}.init_args."
        f"{'' if name in ('root', 'limit', 'batch_size', 'crop', 'steps', 'test_crop') else 'network.init_args.'}"
        f"{name}={value}"
        for name, value in options.items()
    ]
    fixed = ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", f"--output={output}"]
    assert train.main(["fit", "--config", str(CONFIGS / f"{row}.yaml"), *fixed, *more]) == 0
    return output


@pytest.fixture(scope="module")
def sdnet(root, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sdnet10" / "seed0"
    return trained("sdnet10", folder, root=root, limit=32, batch_size=16, width=2)


def test_a_denoiser_trains_and_logs_its_psnr(tmp_path):
    options = {"filters": 4, "kernel": 5, "stride": 4, "unfoldings": 2}
    output = trained("cscnet-25", tmp_path / "run", crop=16, steps=2, test_crop=24, **options)
    columns = report.history(output)
    assert 0 < columns["val_psnr"][0] < 60 and 0 <= columns["density/code"][0] <= 1


def test_the_report_has_the_papers_numbers_and_says_what_was_reproduced(sdnet, tmp_path):
    assert report.main(["--runs", str(sdnet.parents[1]), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    accuracy = 100 * report.history(sdnet)["val_accuracy"][-1]
    assert f"| SDNet-10, width 16, stem | `sdnet10` |  | {accuracy:.2f} | 1 epochs, 1 seed |" in page
    assert "| Res-CSC, 20 layers | `rescsc-20` | 91.82 | not run |  |" in page
    assert page.count("Not run.") == sum(len(family.chains) for family in csc_tables.FAMILIES)
    assert (tmp_path / "csc-accuracy.png").exists() and "| sdnet10 | 0 | 1 |" in page


def test_verdicts_are_of_the_order_alone():
    family = csc_tables.FAMILIES[0]
    chain = ["mlcsc-cifar-ml-ista", "mlcsc-cifar-ml-fista", "mlcsc-cifar-cnn"]
    said = csc_tables.verdict(family, chain, {chain[0]: 0.7, chain[1]: 0.6, chain[2]: 0.5})
    assert "Ours: ML-ISTA > ML-FISTA > CNN. Reproduced: 3 of 3" in said
    said = csc_tables.verdict(family, chain, {chain[0]: 0.4, chain[2]: 0.5})
    assert said.startswith("Published: ML-ISTA > ML-FISTA > CNN. Ours: CNN > ML-ISTA. Not reproduced: 0 of 1")
    assert said.endswith("1 not run.") and "Not run." in csc_tables.verdict(family, chain, {chain[0]: 0.4})


# ---------------------------------------------------------------------------------------------------- robust inference


@pytest.mark.parametrize("name", robust_inference.LEVELS)
def test_corruptions_are_noise_of_their_level(name):
    corrupt, pictures = robust_inference.corruption(name), torch.full((2, 3, 64, 64), 0.5)
    level = robust_inference.LEVELS[name][2]
    noisy = corrupt(pictures, level)
    assert noisy.dtype == torch.float32 and 0 <= noisy.min() and noisy.max() <= 1
    assert torch.equal(noisy, corrupt(pictures.clone(), level))  # lambdas are compared on the same pictures
    other = pictures.clone()
    other[1] += 0.1
    assert not torch.equal(noisy[0], corrupt(other, level)[0])  # another batch has other noise
    expected = {
        "gaussian": level,
        "shot": np.sqrt(0.5 / level),
        "speckle": 0.5 * level,
        "impulse": 0.5 * np.sqrt(level),
    }[name]
    assert float((noisy - pictures).square().mean().sqrt()) == pytest.approx(expected, rel=0.05)
    strengths = [float((corrupt(pictures, level) - pictures).norm()) for level in robust_inference.LEVELS[name]]
    assert strengths == sorted(strengths)


def test_another_corruption_is_named():
    with pytest.raises(ValueError, match="corruption is 'fog', it takes one of gaussian, shot, speckle, impulse"):
        robust_inference.corruption("fog")


def test_levels_are_spread_over_the_papers():
    assert robust_inference.spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert robust_inference.spread([1, 2], 5) == [1, 2]


def test_the_network_of_a_run_is_the_trained_one(sdnet, root):
    model, facts = robust_inference.load(sdnet)
    assert facts["row"] == "sdnet10" and not model.training
    test = robust_inference.batches(root, False, 32)
    assert robust_inference.accuracy(model, test) == pytest.approx(report.history(sdnet)["val_accuracy"][-1])


def test_robust_inference_writes_its_results_and_figure(sdnet, root, tmp_path, monkeypatch, capsys):
    class Attack:
        def __init__(self, model, eps, alpha, steps):
            self.eps = eps

        def __call__(self, pictures, labels):
            return (pictures + self.eps).clamp(0, 1)

    monkeypatch.setitem(sys.modules, "torchattacks", SimpleNamespace(PGD=Attack, PGDL2=Attack))
    monkeypatch.setattr(robust, "find_spec", lambda name: object())
    monkeypatch.setattr(robust_inference, "LAMBDAS", [0.05, 0.5])
    options = ["--root", str(root), "--limit", "32", "--levels", "2", "--output", str(tmp_path), "--attacks"]
    assert robust.main([str(sdnet), "--corruptions", "gaussian", "shot", *options]) == 0
    found = json.loads((tmp_path / "robust.json").read_text())
    assert (
        found["corruptions"].keys() == {"gaussian", "shot"}
        and found["attacks"].keys() == robust_inference.ATTACKS.keys()
    )
    for values in found["corruptions"].values():
        assert len(values["accuracies"]) == len(values["points"]) == 2
        for point, curve in zip(values["points"], values["accuracies"], strict=True):
            assert 0.05 <= point["lambda"] <= 0.5 and len(curve) == 2
    assert (tmp_path / "robust.png").read_bytes().startswith(b"\x89PNG")
    assert "gaussian 0.2: " in capsys.readouterr().out
    shown, first = report.robust_table(tmp_path), found["corruptions"]["gaussian"]["points"][0]
    numbers = f"{100 * first['as_trained']:.2f} | {100 * first['adapted']:.2f} | {first['lambda']:.2f}"
    assert f"| gaussian 0.02 | {numbers} | 44.43 | 50.58 | 64.92 |" in shown and "| PGD L2 0.5 |" in shown
    assert f"By `python -m examples.robust {sdnet} --corruptions gaussian shot --root {root} " in shown
    assert f", commit {commit()}, dsc_ops " in shown and found["hours"] > 0
    better = sum(p["adapted"] > p["as_trained"] for v in found["corruptions"].values() for p in v["points"])
    assert f"{better} of 4 levels" in shown and "Not run" in report.robust_table(tmp_path / "none")
    # The layer is left with the lambda that it was trained with.
    model, _ = robust_inference.load(sdnet)
    assert float(model.network.stem.conv.lam) == pytest.approx(0.1)


def test_attacks_stay_within_their_norm():
    pytest.importorskip("torchattacks", reason="it needs pip install dsc_ops[robust]")
    torch.manual_seed(0)
    model = robust_inference.OnPictures(SDNet(10, width=2)).eval()
    test = [(torch.rand(4, 3, 16, 16), torch.arange(4))]
    for name, (_, eps, _) in robust_inference.ATTACKS.items():
        ((pictures, _),) = robust_inference.attacked(model, test, name)
        change = pictures - test[0][0]
        size = change.abs().max() if "inf" in name else change.flatten(1).norm(dim=1).max()
        assert 0 < size <= eps * (1 + 1e-4) and 0 <= pictures.min() and pictures.max() <= 1
        with torch.no_grad():
            losses = [F.cross_entropy(model(x), test[0][1]) for x in (pictures, test[0][0])]
        assert losses[0] > losses[1]


def test_robust_inference_names_what_it_cannot_take(sdnet, tmp_path, monkeypatch, capsys):
    with pytest.raises(
        SystemExit, match=r"run\.json is not there: RUN is a folder that python -m examples\.train made"
    ):
        robust.main([str(tmp_path)])
    record = json.loads((sdnet / "run.json").read_text())
    record["settings"]["model"]["init_args"]["network"]["init_args"]["coded"] = "none"
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit, match="has no CSCConv layer"):
        robust.main([str(tmp_path)])
    monkeypatch.setattr(robust, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs torchattacks, not installed here: pip install dsc_ops\[robust\]"):
        robust.main([str(sdnet), "--attacks"])
    for arguments, said in ((["--levels", "1"], "--levels is 1, it takes at least 2"), (["--help"], "robust.png")):
        with pytest.raises(SystemExit):
            robust.main([str(sdnet), *arguments])
        printed = capsys.readouterr()
        assert said in printed.err + printed.out
