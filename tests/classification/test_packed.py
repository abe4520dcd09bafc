"""Datasets in tars, zips, shards and of Hugging Face: twenty pictures in each form are those of a folder."""

import io
import tarfile
import zipfile

import pytest
import torch
from PIL import Image
from support.training import MEAN, STD, numbers_of, square, write_squares

from vrwkv.classification.config import AugmentConfig, DataConfig
from vrwkv.classification.data import create_eval_loader, create_train_loader, find_pictures
from vrwkv.runtime.errors import UserError
from vrwkv.runtime.images import open_image
from vrwkv.runtime.processes import World

PICTURES, CLASSES = 20, 2
CPU = World(torch.device("cpu"))
SETTINGS = {"input_size": (3, 16, 16), "interpolation": "bicubic", "mean": MEAN, "std": STD, "crop_pct": 1.0}
SETTINGS["crop_mode"] = "center"


def write_tar(path, files):
    """`files` are names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def files_of(root, split, outer="", only=""):
    files = [
        (file.relative_to(root / split), file.read_bytes()) for file in (root / split).glob(f"{only or '*'}/*.png")
    ]
    return [(outer + (file.name if only else str(file)), content) for file, content in files]


def make_tar(root, to, split):
    write_tar(to / f"{split}.tar", [*files_of(root, split), ("notes.txt", b"none"), ("class0/.hidden.png", b"none")])


def make_tar_of_each_class(root, to, split):
    (to / split / ".cache").mkdir(parents=True)
    (to / split / ".hidden.tar").write_bytes(b"none")
    for name in ("class0", "class1"):
        write_tar(to / split / f"{name}.tar", files_of(root, split, only=name))


def make_tar_of_tars(root, to, split):
    inner = [write_tar(to / f"{name}.inner", files_of(root, split, only=name)) for name in ("class0", "class1")]
    write_tar(to / f"{split}.tar", [(f"{path.stem}.tar", path.read_bytes()) for path in inner])


def write_zip(path, files, method=zipfile.ZIP_STORED):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "a", method) as file:
        for name, content in files:
            file.writestr(name, content)
    return path


def make_zip(root, to, split):
    files = files_of(root, split)
    write_zip(to / f"{split}.zip", [("class0/", b""), *files, ("notes.txt", b"none"), ("class0/.hidden.png", b"none")])


def make_zip_of_each_class(root, to, split):
    for name in ("class0", "class1"):
        write_zip(to / split / f"{name}.zip", files_of(root, split, only=name), zipfile.ZIP_DEFLATED)


def make_zip_of_all(root, to, split):
    write_zip(to / "all.zip", files_of(root, split, f"{split}/"), zipfile.ZIP_DEFLATED)


def make_tar_of_all(root, to, split):
    write_tar(to / "all.tar", [pair for each in ("train", "val") for pair in files_of(root, each, f"{each}/")])


def make_shards(root, to, split):
    for shard in (0, 1):
        files = []
        for i in range(shard, PICTURES, 2):
            files.append((f"{i:04}.png", (root / split / f"class{i % CLASSES}" / f"{i}.png").read_bytes()))
            files.append((f"{i:04}.cls", str(i % CLASSES).encode()))
        write_tar(to / split / f"{shard:03}.tar", files)


def make_hugging_face(root, to, split):
    datasets = pytest.importorskip("datasets")
    paths = [str(root / split / f"class{i % CLASSES}" / f"{i}.png") for i in range(PICTURES)]
    names = datasets.ClassLabel(names=["class0", "class1"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    columns = {"image": paths, "label": [i % CLASSES for i in range(PICTURES)]}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(to / split))


FORMS = {
    "tar": (make_tar, "{}"),
    "tar of each class": (make_tar_of_each_class, "{}"),
    "tar of tars": (make_tar_of_tars, "{}"),
    "tar of all": (make_tar_of_all, "{}/all.tar"),
    "zip": (make_zip, "{}"),
    "zip of each class": (make_zip_of_each_class, "{}"),
    "zip of all": (make_zip_of_all, "{}/all.zip"),
    "shards": (make_shards, "wds/{}"),
    "hugging face": (make_hugging_face, "hfds/{}"),
}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"), PICTURES, CLASSES)


@pytest.fixture(scope="module", params=list(FORMS))
def root(request, squares, tmp_path_factory):
    """data.root of each form."""
    make, form = FORMS[request.param]
    to = tmp_path_factory.mktemp("packed")
    for split in ("train", "val"):
        make(squares, to, split)
    return form.format(to)


def train_loader(root, workers=0, **augment):
    pictures = find_pictures(root, "train")
    config = DataConfig(root=root, batch_size=4, workers=workers)
    return create_train_loader(pictures, list(pictures.pictures), SETTINGS, config, AugmentConfig(**augment), 0, CPU)


def images_of(loader):
    return torch.cat([images for images, _ in loader])


def test_pictures_and_classes(root):
    pictures = find_pictures(root, "val")
    assert list(pictures.pictures) in (["class0", "class1"], ["0", "1"])
    assert "20 pictures of" in pictures.describe()
    config = DataConfig(root=root, batch_size=7, workers=2)
    batches = list(create_eval_loader(pictures, list(pictures.pictures), SETTINGS, config, CPU))
    numbers = numbers_of(torch.cat([images for images, _ in batches]), PICTURES)
    assert sorted(numbers) == list(range(PICTURES))
    assert torch.cat([classes for _, classes in batches]).tolist() == [number % CLASSES for number in numbers]


def test_training_goes_on_within_an_epoch_with_any_number_of_workers(root):
    augment = {"auto_augment": "rand-m9-mstd0.5-inc1"}
    whole = images_of(train_loader(root, **augment))
    assert whole.shape == (PICTURES, 3, 16, 16)
    rest = train_loader(root, workers=2, **augment)
    rest.batch_sampler.start(0, 2)
    assert torch.equal(images_of(rest), whole[8:])


@pytest.mark.usefixtures("no_curves")
def test_train_and_validate(root, tmp_path, train, train_args, validate, capsys):
    assert train(train_args(tmp_path, f"data.root={root}", "epochs=1", "data.workers=1")) == 0
    assert validate(["--checkpoint", str(tmp_path / "best.pth"), "-j", "0"]) == 0
    assert "20 images" in capsys.readouterr().out


def refused(root, split="train"):
    with pytest.raises(UserError) as caught:
        find_pictures(str(root), split)
    return str(caught.value)


def test_tar_that_is_cut_off_or_damaged(tmp_path, squares):
    path = write_tar(tmp_path / "train.tar", files_of(squares, "train"))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2]
    for content in (whole[: third.offset], whole[: third.offset + 200], whole[: third.offset_data + 1]):
        path.write_bytes(content)
        assert refused(tmp_path).startswith(f"cannot read tar {path}: ")
    path.write_bytes(whole[: third.offset] + b"x" * 512 + whole[third.offset_data :])
    assert refused(tmp_path) == f"cannot read tar {path}: damaged or cut off at byte {third.offset}"
    path.write_bytes(b"no tar")
    assert refused(tmp_path).startswith(f"cannot read tar {path}: ")


def test_zip_that_is_cut_off_or_no_zip(tmp_path, squares):
    path = write_zip(tmp_path / "train.zip", files_of(squares, "train"))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:-1], b"no zip", b""):
        path.write_bytes(content)
        assert refused(tmp_path).startswith(f"cannot read zip {path}: ")


def test_zip_that_other_programs_must_unpack(tmp_path, squares):
    path = write_zip(tmp_path / "train.zip", files_of(squares, "train"), zipfile.ZIP_LZMA)
    assert refused(tmp_path).endswith(".png is encrypted or compressed by something else than deflate")
    path.unlink()
    write_tar(tmp_path / "train.tar", files_of(squares, "train"))
    write_zip(path, files_of(squares, "train"))
    assert refused(tmp_path) == f"required is one of {tmp_path}/train.tar and {path}, given are both"
    assert refused(path, "val") == f"{path}/val holds no pictures"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_picture_in_a_zip_is_named(method, tmp_path, squares):
    """Also where the picture could still be read, with other pixels."""
    path = write_zip(tmp_path / "train.zip", [("class0/0.bmp", square_bmp()), ("class1/1.bmp", square_bmp())], method)
    [member] = find_pictures(str(tmp_path), "train").pictures["class0"]
    whole = path.read_bytes()
    assert member.read() == square_bmp()
    for place in (member.offset, member.offset + 200):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"cannot read image {path}/class0/0.bmp: "):
            open_image(member)


def square_bmp():
    file = io.BytesIO()
    Image.fromarray(square(0)).save(file, "bmp")
    return file.getvalue()


def test_corrupt_picture_in_a_tar_is_named(tmp_path, squares):
    files = files_of(squares, "train")
    write_tar(tmp_path / "train.tar", [*files[1:], (files[0][0], files[0][1][:100])])
    with pytest.raises(UserError, match=f"cannot read image {tmp_path}/train.tar/{files[0][0]}: "):
        images_of(train_loader(str(tmp_path)))


def test_pictures_without_a_class(tmp_path, squares):
    picture = (squares / "train" / "class0" / "0.png").read_bytes()
    write_tar(tmp_path / "train.tar", [("0.png", picture)])
    assert "train.tar/0.png lies in no class" in refused(tmp_path)
    write_tar(tmp_path / "val" / "0.tar", [("0.png", picture), ("0.json", b"{}")])
    assert "val/0.tar/0.png has no class" in refused(f"wds/{tmp_path}", "val")
    write_tar(tmp_path / "val" / "0.tar", [("0.png", picture), ("0.jpg", picture), ("0.cls", b"1")])
    assert "is not the only one of its sample" in refused(f"wds/{tmp_path}", "val")
    write_tar(tmp_path / "empty.tar", [("notes.txt", b"")])
    assert "empty holds no pictures" in refused(tmp_path, "empty")


def test_folders_below_the_classes(tmp_path, squares):
    picture = (squares / "train" / "class0" / "0.png").read_bytes()
    for name in ("a", "b"):
        write_tar(tmp_path / "train" / f"{name}.tar", [("images/0.png", picture)])
    write_tar(tmp_path / "val.tar", [("a/images/0.png", picture), ("b/images/0.png", picture)])
    for split in ("train", "val"):
        assert "is one class, by a/images and b/images: required is class/picture" in refused(tmp_path, split)


def test_shards_by_a_pattern(tmp_path, squares):
    picture = (squares / "train" / "class0" / "0.png").read_bytes()
    for name, number in (("a-train-0", "2"), ("a-train-1", "10"), ("a-val-0", "3")):
        write_tar(
            tmp_path / f"{name}.tar", [(f"sub.1/{name}.PNG", picture), (f"sub.1/{name}.cls", f"{number}\n".encode())]
        )
    assert list(find_pictures(f"wds/{tmp_path}", "a-train-*.tar").pictures) == ["2", "10"]
    assert "no shards" in refused(f"wds/{tmp_path}", "a-test-*.tar")


@pytest.mark.parametrize("form", ["hfids", "tfds"])
def test_streams_are_refused(form):
    assert "use hfds/ or wds/" in refused(f"{form}/imagenet")


def test_hugging_face_datasets_that_do_not_fit(tmp_path):
    datasets = pytest.importorskip("datasets")
    assert refused(f"hfds/{tmp_path}/absent").startswith(f"cannot load dataset {tmp_path}/absent: ")
    image = datasets.Image().encode_example(square(0))
    labels = datasets.ClassLabel(names=["z", "a"])
    for name, column, numbers, kind in (
        ("no labels", "label", [0, -1], labels),
        ("other column", "fine_label", [0, 1], labels),
        ("good", "label", [1, 0], labels),
    ):
        features = datasets.Features({"image": datasets.Image(), column: kind})
        data = datasets.Dataset.from_dict({"image": [image] * 2, column: numbers}, features=features)
        datasets.DatasetDict({"train": data}).save_to_disk(str(tmp_path / name))
    assert "no labels/train[1] has no label" in refused(f"hfds/{tmp_path}/no labels")
    assert "has no column label, but image, fine_label" in refused(f"hfds/{tmp_path}/other column")
    assert "has no split 'trai', but train; nearest: train" in refused(f"hfds/{tmp_path}/good", "trai")
    assert list(find_pictures(f"hfds/{tmp_path}/good", "train").pictures) == ["z", "a"]  # the dataset's order
