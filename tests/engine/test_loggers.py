"""Each logger gets text, histograms and figures through its own methods; what one drops is said once."""

import inspect
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.tensorboard import SummaryWriter

from lightning_sym.callbacks import monitors
from lightning_sym.engine.dashboard import layout
from lightning_sym.engine.loggers import WRITERS, Loggers
from tests.models import Classifier, mlp

MEDIA = {
    "q/words": "two words",
    "q/a/spectrum": torch.tensor([1.0, 2.0, math.nan, 4.0]),
    "q/picture": lambda: Figure(),
}
VALUES = {"q/score": 0.5, "q/a/rank": 2.0}


class FakeClient:
    """MlflowClient's methods that are used, with its signatures."""

    def __init__(self):
        self.calls = []

    def log_artifact(self, run_id, local_path, artifact_path=None):
        raise AssertionError

    def log_text(self, run_id, text, artifact_file):
        self.calls.append(("text", run_id, text, artifact_file))

    def log_dict(self, run_id, dictionary, artifact_file):
        self.calls.append(("dict", run_id, dictionary, artifact_file))

    def log_figure(self, run_id, figure, artifact_file, *, save_kwargs=None):
        assert isinstance(figure, Figure)
        self.calls.append(("figure", run_id, artifact_file))


def checked(kind, **given):
    """Return a stand-in for a logger: every call must fit the real method's signature, and is kept."""
    made = SimpleNamespace(calls=[], **given)

    def method(name):
        signature = inspect.signature(getattr(kind, name))

        def call(*args, **kwargs):
            made.calls.append((name, signature.bind(None, *args, **kwargs).arguments))

        return call

    for name in ("log_metrics", "log_image", "log_table"):
        if hasattr(kind, name):
            setattr(made, name, method(name))
    return made


def test_weights_and_biases_gets_images_and_tables(monkeypatch):
    histogram = SimpleNamespace(Histogram=lambda values, num_bins: ("histogram", values, num_bins))
    monkeypatch.setitem(__import__("sys").modules, "wandb", histogram)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb")
    logger = checked(WandbLogger, experiment=SimpleNamespace(log=None))
    told = []
    assert Loggers([logger], told.append).send(VALUES, MEDIA, 7) == []
    assert told == []
    scalars, words, spectrum, picture = [arguments for _, arguments in logger.calls]
    assert (scalars["metrics"], scalars["step"]) == (VALUES, 7)
    assert (words["key"], words["data"], words["step"]) == ("q/words", [[7, "two words"]], 7)
    assert spectrum["metrics"] == {"q/a/spectrum": ("histogram", [1.0, 2.0, 4.0], 64)}
    assert picture["key"] == "q/picture"
    assert isinstance(picture["images"][0], Figure)


def test_mlflow_gets_artifacts_by_step():
    client = FakeClient()
    logger = checked(MLFlowLogger, experiment=client, run_id="r1")
    assert Loggers([logger], pytest.fail).send(VALUES, MEDIA, 7) == []
    assert logger.calls[0][1]["metrics"] == VALUES
    text, spectrum, picture = client.calls
    assert text == ("text", "r1", "two words", "q/words/step_00000007.txt")
    assert spectrum[2]["low"], spectrum[2]["high"] == (1.0, 4.0)
    assert sum(spectrum[2]["counts"]) == 3
    assert spectrum[3] == "q/a/spectrum/step_00000007.json"
    assert picture == ("figure", "r1", "q/picture/step_00000007.png")


def read(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    return accumulator, accumulator.Tags()


def test_tensorboard_gets_all_media_and_a_layout(tmp_path):
    writer = SummaryWriter(tmp_path)
    loggers = Loggers([writer], pytest.fail)
    assert loggers.send(VALUES, MEDIA, 7) == []
    assert loggers.send({"q/b/rank": 1.0}, {}, 8) == []
    writer.close()
    accumulator, tags = read(tmp_path)
    assert set(tags["scalars"]) == {*VALUES, "q/b/rank"}
    assert tags["histograms"] == ["q/a/spectrum"]
    assert tags["images"] == ["q/picture"]
    assert set(tags["tensors"]) == {"q/words/text_summary", "custom_scalars__config__"}
    last = accumulator.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0]
    assert b"q/b/rank" in last


def test_what_is_dropped_is_said_once_and_its_figure_not_drawn(tmp_path):
    told = []
    loggers = Loggers([CSVLogger(tmp_path)], told.append)
    media = {**MEDIA, "q/picture": lambda: pytest.fail("drawn for nobody")}
    assert loggers.send(VALUES, media, 1) == loggers.send(VALUES, media, 2) == []
    (said,) = told
    assert said.startswith("lightning_sym: CSVLogger takes no text and no histogram and no figure; q/words")


def test_a_logger_that_fails_keeps_nothing_from_the_others():
    def broken(values, step):
        raise OSError("full")

    seen = []
    loggers = Loggers([broken, lambda values, step: seen.append((values, step))], lambda said: None)
    assert loggers.send(VALUES, MEDIA, 3) == ["function: OSError: full"]
    assert seen == [(VALUES, 3)]


def test_scalars_are_sent_as_lightning_and_fabric_send_them():
    """By keyword: a logger may take them in no other way, and who wraps one finds them under their names."""
    seen = []

    class Logger:
        def log_metrics(self, **given):
            seen.append(given)

    assert Loggers([Logger()], pytest.fail).send(VALUES, {}, 3) == []
    assert seen == [{"metrics": VALUES, "step": 3}]


def test_other_ranks_send_scalars_alone():
    """Lightning's experiments of other ranks have every attribute, and do nothing."""
    seen = []

    class Logger:
        def log_metrics(self, metrics, step):
            seen.append(metrics)

        @property
        def experiment(self):
            raise AssertionError

    assert Loggers([Logger()], pytest.fail).send(VALUES, MEDIA, 3, lead=False) == []
    assert seen == [VALUES]


def test_every_medium_has_a_writer_of_each_named_logger():
    table = {(writer.logger, writer.medium) for writer in WRITERS}
    names = {name for name, _ in table}
    assert names == {"TensorBoard", "Weights & Biases", "MLflow"}
    assert len(table) == len(WRITERS) == 3 * len(names)


def test_the_layout_opens_with_the_overview_and_goes_by_depth():
    keys = ["collapse/net.10/rank", "collapse/net.2/rank", "gap/net.2", "collapse/score", "own/summary"]
    made = layout([*keys, "collapse/samples", "epoch"])
    assert list(made) == ["overview", "collapse/rank", "gap"]
    assert list(made["overview"]) == ["loss", "collapse score", "own: summary"]
    assert list(made["collapse/rank"]) == ["net.10", "net.2"]
    (pattern,) = made["gap"]["net.2"][1]
    assert pattern == r"^(.+-)?gap/net\.2$"


class WithParameters(Classifier):
    def __init__(self, lr, widths):
        super().__init__(mlp(6, 12, 4), lr=lr)
        self.save_hyperparameters()


@pytest.mark.parametrize("default", [True, False])
def test_hyperparameters_stand_beside_the_final_readings(tmp_path, default):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 6), torch.arange(32) % 4), 16)
    logger = TensorBoardLogger(tmp_path, default_hp_metric=default)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[*monitors("light", every_n_steps=1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*log_every_n_steps.*")
        trainer.fit(WithParameters(0.1, {"a": 3, "b": [1]}), data)
    logger.experiment.close()
    accumulator, tags = read(logger.log_dir)
    metadata = accumulator.SummaryMetadata
    if not default:
        assert "_hparams_/experiment" not in accumulator.summary_metadata
        return
    content = metadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    named = {info.name.tag for info in experiment.metric_infos}
    shown = {
        "signal/loss",
        "findings/alarms",
        "findings/warnings",
        "collapse/score",
        "plasticity/dormant_units",
    }
    assert named == {"hp_metric", *shown}
    assert named <= set(tags["scalars"])
    assert {info.name for info in experiment.hparam_infos} == {"lr", "widths/a", "widths/b"}
    session = HParamsPluginData.FromString(metadata("_hparams_/session_start_info").plugin_data.content)
    assert set(session.session_start_info.hparams) == {"lr", "widths/a", "widths/b"}


def test_a_real_run_of_weights_and_biases_takes_everything(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        before = torch.random.get_rng_state()
        assert Loggers([logger], pytest.fail).send(VALUES, MEDIA, 7) == []
        summary = dict(logger.experiment.summary)
        logger.experiment.finish()
    assert torch.equal(before, torch.random.get_rng_state())
    assert summary["q/score"] == 0.5
    assert {"q/words", "q/a/spectrum", "q/picture"} <= set(summary)


def test_a_real_run_of_mlflow_takes_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    pytest.importorskip("mlflow")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = MLFlowLogger("e", tracking_uri=f"file:{tmp_path}")
        assert Loggers([logger], pytest.fail).send(VALUES, MEDIA, 7) == []
        client, run = logger.experiment, logger.run_id
        assert client.get_run(run).data.metrics == VALUES
        files = [
            file.path
            for folder in client.list_artifacts(run, "q")
            for file in client.list_artifacts(run, folder.path)
        ]
    assert {"q/words/step_00000007.txt", "q/picture/step_00000007.png"} <= set(files)
