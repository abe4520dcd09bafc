"""Reading mmengine's configs, and checking what they name before it is used."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from vrwkv.runtime.errors import UserError, first_line, nearest
from vrwkv.runtime.processes import is_primary
from vrwkv.runtime.progress import say
from vrwkv.segmentation.engine import config_errors
from vrwkv.segmentation.schema import check_settings


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """Overrides given on a command line as KEY=VALUE, values as mmengine reads them.

    Raises:
        UserError: one is not of this form.
    """
    for option in options:
        if not option.partition("=")[1]:
            raise UserError(f"--cfg-options takes KEY=VALUE, got {option!r}")
    parsed = Namespace()
    try:
        DictAction([], "options")(ArgumentParser(), parsed, options)
    except AssertionError as error:
        raise UserError(f"--cfg-options cannot be read: {first_line(error)}") from error
    return parsed.options


def load_config(config: str | Path | Config, options: Mapping[str, Any] | None = None) -> Config:
    """A config, with overrides of its keys.

    Raises:
        UserError: there is no such file, it is broken, an override does not fit, or a setting is out of range.
    """
    try:
        cfg = deepcopy(config) if isinstance(config, Config) else Config.fromfile(config)
    except FileNotFoundError as error:
        raise UserError(f"config {config} does not exist") from error
    except Exception as error:  # a config is a program
        raise UserError(f"config {config} cannot be read: {first_line(error)}") from error
    known = [*cfg, "load_from", "randomness", "work_dir"]
    for key in options or {}:
        if (first := key.partition(".")[0]) not in known:
            raise UserError(f"the config has no key {first!r}{nearest(first, known)}")
    for key, value in (options or {}).items():
        try:
            cfg.merge_from_dict({key: value})
        except Exception as error:  # whatever comes of treating a list or a number as a dict
            raise UserError(f"{key}={value} does not fit the config: {first_line(error)}") from error
    if not cfg.get("model"):
        raise UserError(f"config {cfg.filename} has no model")
    check_settings(cfg.to_dict())
    init_default_scope(cfg.get("default_scope", "mmseg"))
    return cfg


def loaders(cfg: Config) -> Iterator[tuple[str, Any]]:
    """The config's datasets that read files, by the names of their dataloaders."""
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        if cfg.get(name):
            yield from ((name, dataset) for dataset in _unwrapped(cfg[name].dataset))


def _unwrapped(dataset: Any) -> Iterator[Any]:
    """The settings of a dataset, or of those that it wraps, as ConcatDataset and RepeatDataset do."""
    inner = [dataset["dataset"]] if dataset.get("dataset") else dataset.get("datasets")
    if inner:
        for each in inner:
            yield from _unwrapped(each)
    else:
        yield dataset


def type_name(settings: Mapping[str, Any]) -> str:
    """The bare name of what a registry builds; it may be given with a scope, as "mmseg.X", or as the class itself."""
    kind = settings["type"]
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def inference_pipeline(cfg: Config) -> Any:
    """The config's test pipeline, or else that of its test data.

    Raises:
        UserError: it has neither.
    """
    of_data = (dataset.get("pipeline") for name, dataset in loaders(cfg) if name == "test_dataloader")
    found = cfg.get("test_pipeline") or next(of_data, None)
    if not found:
        raise UserError(f"config {cfg.filename} has neither a test_pipeline nor a test_dataloader.dataset.pipeline")
    return found


def leave_first_weights(cfg: Config) -> None:
    """Take out of a config where its backbone's first weights come from, as those of a checkpoint replace them."""
    cfg.model.pop("pretrained", None)  # mmseg hands it to the backbone
    backbone = cfg.model.backbone
    backbone.pop("init_cfg", None)
    if backbone.get("model_args"):
        backbone.model_args.pop("pretrained", None)


def _type_of(dataset: Mapping[str, Any]) -> Any:
    return DATASETS.get(dataset["type"]) if isinstance(dataset["type"], str) else dataset["type"]


def meta_of(dataset: Mapping[str, Any]) -> Mapping[str, Any]:
    """Class names and palette in a dataset's settings, or else of its type, as far as they are given."""
    return dataset.get("metainfo") or getattr(_type_of(dataset), "METAINFO", {})


def check_data(cfg: Config, names: tuple[str, ...]) -> None:
    """Make sure that the folders of the named dataloaders hold data, and that their classes are as many as the model's.

    Raises:
        UserError: otherwise.
    """
    for name, dataset in loaders(cfg):
        if name not in names:
            continue
        for kind, folder in dataset.get("data_prefix", {}).items():
            path = Path(dataset.get("data_root") or "", folder)
            if not path.is_dir():
                raise UserError(f"{name}: the {kind} folder {path} does not exist; set {name}.dataset.data_root")
            if not any(path.iterdir()):
                raise UserError(f"{name}: the {kind} folder {path} is empty")
        classes, wanted = len(meta_of(dataset).get("classes", [])), cfg.model.decode_head.num_classes
        if classes and classes != wanted:
            raise UserError(f"{name} has {classes} classes, model.decode_head.num_classes is {wanted}")
        kind = _type_of(dataset)
        if isinstance(kind, type) and issubclass(kind, BaseSegDataset) and "img_path" in dataset.get("data_prefix", {}):
            _check_pictures(name, dataset)


def _check_pictures(name: str, dataset: Any) -> None:
    """Make sure that a dataset finds pictures, and say so where it leaves files out."""
    with config_errors(f"{name}: the dataset cannot be used"):
        built = DATASETS.build({**dataset, "pipeline": [], "lazy_init": True})
        count = len(built.load_data_list())
    if built.ann_file:
        if not count:
            raise UserError(f"{name}: {built.ann_file} names no pictures")
        return
    path, ending = Path(built.data_prefix["img_path"]), built.img_suffix
    files = sum(file.is_file() and not file.name.startswith(".") for file in path.rglob("*"))
    if not count:
        raise UserError(f"{name}: none of the {files} files in {path} ends in {ending}; set {name}.dataset.img_suffix")
    if count < files and is_primary():
        say(f"{name}: {count} of the {files} files in {path} end in {ending}, the others are left out")


def dataset_meta(meta: Mapping[str, Any], cfg: Config, num_classes: int) -> dict[str, Any]:
    """Class names and palette: of a checkpoint's `meta`, else of the config's data.

    Raises:
        UserError: the checkpoint names another number of classes.
    """
    found = meta.get("dataset_meta") or {key.lower(): meta[key] for key in ("CLASSES", "PALETTE") if key in meta}
    if not found.get("classes"):  # weights alone
        datasets = (meta_of(dataset) for _, dataset in loaders(cfg))
        found = next((info for info in datasets if len(info.get("classes", [])) == num_classes), {})
    classes = list(found.get("classes") or map(str, range(num_classes)))
    palette = list(found.get("palette") or default_palette(num_classes))
    if len(classes) != num_classes or len(palette) != num_classes:
        raise UserError(
            f"the checkpoint names {len(classes)} classes and {len(palette)} colours, the config has {num_classes}"
        )
    return {"classes": classes, "palette": palette}


def default_palette(num_classes: int) -> list[list[int]]:
    """Colours that are easy to tell apart, black first: bits of the class index spread over the three channels."""
    return [
        [sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
        for index in range(num_classes)
    ]
