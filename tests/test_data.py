import io
import tarfile
import time

import numpy as np
import pytest
import torch
from faults import survived
from PIL import Image
from torchvision.datasets import CIFAR10, Imagenette

from hinv.companion import data


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HINV_DATA", str(tmp_path))
    return tmp_path


def write_tree(root, splits=("train", "test"), classes=("cat", "dog", "eel"), images=4, size=(12, 10)):
    rng = np.random.default_rng(0)
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for k in range(images):
                pixels = rng.integers(0, 256, (size[1], size[0] + k, 3), dtype=np.uint8)
                pixels[0, 0] = number * 10
                Image.fromarray(pixels).save(folder / f"{k}.png")


def test_digits_need_nothing(home):
    train, test = data.load("digits"), data.load("digits", "test")
    assert train.x.shape == (1437, 1, 8, 8) and test.x.shape == (360, 1, 8, 8)
    assert train.name == "digits" and train.x.dtype == torch.float32 and train.y.dtype == torch.int64
    assert train.x.min() == 0 and train.x.max() == 1
    counts = torch.bincount(test.y)
    assert len(counts) == 10 and counts.min() >= 35 and counts.max() <= 37


def test_balanced_and_seeded(home):
    first, again, other = (data.load("digits", n=25, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    counts = torch.bincount(first.y, minlength=10)
    assert counts.sum() == 25 and counts.min() == 2 and counts.max() == 3


def test_folder_tree_resizing_gray_and_normalization(home):
    write_tree(home / "zoo")
    images = data.load("zoo", n=6, side=8, dtype=torch.float64)
    assert images.x.shape == (6, 3, 8, 8) and images.classes == ["cat", "dog", "eel"] and images.name == "zoo"
    assert torch.bincount(images.y).tolist() == [2, 2, 2]
    gray = data.load("zoo", n=6, side=8, gray=True, normalize=True, dtype=torch.float64)
    assert gray.x.shape == (6, 1, 8, 8)
    assert gray.x.mean().abs() < 1e-12 and abs(gray.x.std().item() - 1) < 1e-12
    test = data.load("zoo", "val", side=8, gray=True, normalize=(gray.mean, gray.std), dtype=torch.float64)
    raw = data.load("zoo", "test", side=8, gray=True, dtype=torch.float64)
    torch.testing.assert_close(test.x, (raw.x - gray.mean) / gray.std)


def test_other_places(home, tmp_path_factory):
    write_tree(home / "cifar10-images")
    assert data.load("cifar10", "test", side=8, n=3).name == "cifar10-images"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_tree(elsewhere)
    assert len(data.load(str(elsewhere), side=8).y) == 12
    write_tree(home / "plain", splits=("",))
    assert len(data.load("plain", side=8).y) == 12


def official_archive(path):
    """A miniature of the official CIFAR-10 archive: five training batches and a test batch, pickled as theirs are."""
    import pickle

    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as archive:

        def add(name, value):
            content = pickle.dumps(value)
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))

        for name in [n for n, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]:
            add(name, {"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8), "labels": [0, 1, 2, 3]})
        add("batches.meta", {"label_names": [f"class {k}" for k in range(10)]})


def test_download_checks_and_unpacks(home, monkeypatch):
    """The first mirror is broken, the second serves: the official files are checked, unpacked and read."""
    archive = home / "source.tar.gz"
    official_archive(archive)
    import hashlib

    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    broken = home / "broken.tar.gz"
    broken.write_bytes(b"not the archive")
    images = data.load("cifar10", mirrors=(broken.as_uri(), archive.as_uri()))
    assert images.x.shape == (20, 3, 32, 32) and images.name == "cifar10"
    assert sorted(p.name for p in home.iterdir()) == ["broken.tar.gz", CIFAR10.base_folder, "source.tar.gz"]
    assert data.load("cifar10", "test", download=False).x.shape == (4, 3, 32, 32)
    survived(
        "download truncated, or another file",
        "its md5 sum is found wrong, and the next host is asked",
        "nothing of it stays on the disk",
    )


def test_imagenette_is_fetched_the_same_way(home, monkeypatch):
    import hashlib

    tree = home / "made" / "imagenette2-160"
    write_tree(tree, splits=("train", "val"))
    archive = home / "imagenette2-160.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "imagenette2-160")
    url = "http://localhost:1/imagenette2-160.tgz"
    monkeypatch.setattr(Imagenette, "_ARCHIVES", {"160px": (url, hashlib.md5(archive.read_bytes()).hexdigest())})
    images = data.load("imagenette", "val", side=8, mirrors=(archive.as_uri(),))
    assert images.name == "imagenette" and images.x.shape[1:] == (3, 8, 8) and (home / "imagenette" / "train").is_dir()


def test_failed_download_names_the_host_and_leaves_nothing(home, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://localhost:1/cifar.tar.gz")
    with pytest.raises(data.DataNotFound, match=r"localhost: .*Three ways: \(1\).*\(2\).*\(3\)"):
        data.load("cifar10")
    assert list(home.iterdir()) == []


def test_slow_download_is_stopped(home, monkeypatch):
    class Slow:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read1(self, size):
            time.sleep(0.02)
            return b"x"

        def read(self, size):  # would wait for the whole block
            time.sleep(10)
            return b"x"

    monkeypatch.setattr(data.urllib.request, "urlopen", lambda *_, **__: Slow())
    with pytest.raises(data.DataNotFound, match=r"www.cs.toronto.edu: not finished after 0.1 s"):
        data.load("cifar10", timeout=0.1)
    assert list(home.iterdir()) == []


def test_fallback_is_never_silent(home):
    images = data.load("imagenet", n=5, fallback="digits")
    assert images.name == "digits (stand-in: imagenet not found)"
    with pytest.raises(data.DataNotFound, match=r"no train images of 'imagenet' below .*Three ways"):
        data.load("imagenet")
    with pytest.raises(data.DataNotFound, match="cifar10"):
        data.load("cifar10", download=False)


def test_a_tree_without_this_split_is_not_read_as_classes(home):
    write_tree(home / "zoo", splits=("train",))
    with pytest.raises(data.DataNotFound, match="zoo has no test images: it holds train"):
        data.load("zoo", "test")


def test_splits_come_from_one_data_set(home):
    """imagenet-a has only training images; imagenet-b, with other classes, must not lend it a test split."""
    write_tree(home / "imagenet-a", splits=("train",))
    write_tree(home / "imagenet-b", classes=("animal", "thing"))
    assert data.load("imagenet", side=8).name == "imagenet-a"
    with pytest.raises(data.DataNotFound, match="imagenet-a has no test images"):
        data.load("imagenet", "test", side=8)


def test_gray_weighs_the_colours(home):
    (home / "colours" / "red").mkdir(parents=True)
    Image.new("RGB", (4, 4), (255, 0, 0)).save(home / "colours" / "red" / "0.png")
    assert data.load("colours", gray=True).x.mean().item() == pytest.approx(0.299, abs=1e-3)


def test_bad_mirrors_are_passed_over(home, monkeypatch):
    monkeypatch.setattr(CIFAR10, "url", "http://localhost:1/cifar.tar.gz")
    with pytest.raises(data.DataNotFound, match=r"None: unknown url type.*localhost"):
        data.load("cifar10", mirrors=("not a url",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "all"}, "unknown split 'all': use 'train', 'test' or 'val'"),
        ({"n": 5000}, "5000 images asked for, digits has 1437"),
        ({"n": 0}, "n must be at least 1"),
    ],
)
def test_bad_options(home, options, message):
    with pytest.raises(ValueError, match=message):
        data.load("digits", **options)


def test_unequal_sizes_and_unreadable_images(home):
    write_tree(home / "zoo")
    with pytest.raises(ValueError, match="the images of zoo differ in size: give side="):
        data.load("zoo")
    (home / "zoo" / "train" / "cat" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read the image .*0\.png"):
        data.load("zoo", side=8)


# -- what people's folders hold ----------------------------------------------------------------------------------------


def test_sixteen_bits(home):
    """A 16-bit grey image is as bright as its 8-bit copy; Pillow's own conversion makes it white."""
    values = np.linspace(0, 255, 100).astype(np.uint8).reshape(10, 10)
    for bits, array in ((8, values), (16, values.astype(np.uint16) * 257)):
        folder = home / f"gray{bits}" / "train" / "a"
        folder.mkdir(parents=True)
        Image.fromarray(array).save(folder / "0.png")
    eight, sixteen = (data.load(f"gray{bits}").x for bits in (8, 16))
    assert torch.equal(eight, sixteen) and 0.4 < sixteen.mean() < 0.6
    Image.fromarray(values.astype(np.float32) / 255).save(home / "gray16" / "train" / "a" / "0.tiff")
    with pytest.raises(ValueError, match=r"0\.tiff: its pixels are floating point"):
        data.load("gray16")


def test_a_class_has_one_number_in_every_split(home):
    import shutil

    write_tree(home / "zoo")
    shutil.rmtree(home / "zoo" / "test" / "cat")
    train, test = data.load("zoo", side=8), data.load("zoo", "test", side=8)
    assert train.classes == test.classes == ["cat", "dog", "eel"]
    assert test.y.unique().tolist() == [1, 2]


def test_hidden_folders_and_files_are_no_data(home):
    write_tree(home / "zoo")
    for hidden in (home / "zoo" / ".git", home / "zoo" / "train" / ".ipynb_checkpoints"):
        hidden.mkdir()
        Image.new("RGB", (9, 9)).save(hidden / "0-checkpoint.png")
    (home / "zoo" / "train" / "cat" / "._0.png").write_bytes(b"a resource fork")
    images = data.load("zoo", side=8)
    assert images.classes == ["cat", "dog", "eel"] and len(images.y) == 12


def test_folders_without_images(home):
    (home / "empty" / "train" / "cat").mkdir(parents=True)
    with pytest.raises(data.DataNotFound, match="hold no images"):
        data.load("empty")
    write_tree(home / "zoo")
    assert data.load("empty", fallback="zoo", side=8).name == "zoo (stand-in: empty not found)"


def test_a_half_unpacked_cifar(home):
    (home / CIFAR10.base_folder).mkdir()
    (home / CIFAR10.base_folder / "data_batch_1").write_bytes(b"half")
    with pytest.raises(data.DataNotFound, match=r"cifar-10-batches-py is not whole .* or remove it"):
        data.load("cifar10")
    assert data.load("cifar10", fallback="digits").name == "digits (stand-in: cifar10 not found)"
    survived(
        "CIFAR-10 half unpacked, or its pickles damaged",
        "the folder is named before anything is unpickled",
        "what is there; a fallback serves",
    )


def test_a_place_that_is_no_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HINV_DATA", str(tmp_path / "file"))
    with pytest.raises(data.DataNotFound, match="no train images of 'zoo' below"):
        data.load("zoo")


def test_an_archive_that_would_write_elsewhere(home, monkeypatch):
    import hashlib

    archive = home / "source.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo("../outside")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", archive.as_uri())
    with pytest.raises(data.DataNotFound, match="outside"):
        data.load("cifar10")
    assert not (home.parent / "outside").exists() and [p.name for p in home.iterdir()] == ["source.tar.gz"]
    survived(
        "archive with a member that leaves its folder", "it is refused, by the member's name", "nothing is unpacked"
    )


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\nbroken", b"no image at all"])
def test_a_broken_image_is_named(home, content):
    write_tree(home / "zoo")
    (home / "zoo" / "train" / "dog" / "1.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read the image .*dog.1\.png"):
        data.load("zoo", side=8)
    survived("image truncated, empty or none", "the message names the file", "nothing is loaded in part")
