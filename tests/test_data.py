"""Data: every example once on any number of ranks, whatever it is read from; and the data that is on every machine."""

import gzip
import itertools
import os
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from disttrain.comm import shares
from disttrain.comm.one_replica import OneReplica
from disttrain.comm.pipeline import can_pass_over, pass_over
from disttrain.data import Batches, ImageFolder, Table, TFRecords, digits, text
from disttrain.errors import DataError
from launch import launch

# Exactly once, by whomever ---------------------------------------------------------------------------------------------


class Numbers:
    """A source whose examples are their own numbers; remembers what was read."""

    def __init__(self, files):
        self.files, self.places = files, []

    def __len__(self):
        return sum(self.files)

    def read(self, places):
        self.places.append(places)
        return {"number": places}

    def touched(self):
        """Files that were read from."""
        places = np.concatenate(self.places or [np.array([], int)])
        return set(np.searchsorted(np.cumsum(self.files), places, side="right"))


class Rank(OneReplica):
    """One rank of some, as `distribute` sees it."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def numbers(batches):
    return [batch["number"].numpy() for batch in batches]


def seen_by_ranks(files, batch_size, ranks, *, seed, epoch, first=0, end=None):
    """For each of some steps what the ranks see in it, and the sources that they read."""
    sources = [Numbers(files) for _ in range(ranks)]
    by_rank = [
        numbers(Rank(rank, ranks).distribute(Batches(source, batch_size, seed=seed).epoch(epoch).take(end).skip(first)))
        for rank, source in enumerate(sources)
    ]
    return list(zip(*by_rank, strict=True)), sources


FILES = st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any)


@settings(deadline=None, max_examples=40)
@given(FILES, st.integers(1, 12), st.integers(0, 3), st.integers(0, 2))
def test_any_number_of_ranks_sees_the_same_global_batches_once(files, batch_size, seed, epoch):
    """Ragged ends, empty files, batches and data sets smaller than the number of ranks included."""
    whole = numbers(Batches(Numbers(files), batch_size, seed=seed).epoch(epoch))
    assert [len(batch) for batch in whole[:-1]] == [batch_size] * (len(whole) - 1)
    assert sorted(np.concatenate(whole)) == list(range(sum(files)))
    for ranks in range(1, 6):
        steps, sources = seen_by_ranks(files, batch_size, ranks, seed=seed, epoch=epoch)
        for batch, parts in zip(whole, steps, strict=True):
            wanted = shares.split({"number": batch}, ranks)
            for part, share in zip(parts, wanted, strict=True):
                np.testing.assert_array_equal(part, share["number"])
        assert sum(len(places) for source in sources for places in source.places) == sum(files)


@settings(deadline=None, max_examples=40)
@given(FILES, st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_restart_on_another_number_of_ranks_loses_and_repeats_nothing(files, batch_size, before, after, data):
    cut = data.draw(st.integers(0, -(-sum(files) // batch_size)))
    first, _ = seen_by_ranks(files, batch_size, before, seed=1, epoch=2, end=cut)
    then, sources = seen_by_ranks(files, batch_size, after, seed=1, epoch=2, first=cut, end=sum(files))
    whole = numbers(Batches(Numbers(files), batch_size, seed=1).epoch(2))
    np.testing.assert_equal([np.concatenate(parts) for parts in first + then], whole)
    # What is skipped is not read, either.
    assert sum(len(places) for source in sources for places in source.places) == sum(map(len, whole[cut:]))


@settings(deadline=None, max_examples=40)
@given(FILES, st.integers(1, 12), st.integers(1, 5))
def test_ranks_share_few_files(files, batch_size, ranks):
    """They read consecutive parts of a row of files: each of the places between them is in one file at most."""
    full = sum(files) // batch_size  # the smaller batch at the end is cut elsewhere
    _, sources = seen_by_ranks(files, batch_size, ranks, seed=0, epoch=0, end=full)
    assert sum(len(source.touched()) for source in sources) <= sum(n > 0 for n in files) + ranks - 1


def test_ranks_have_files_of_their_own_where_there_are_enough():
    _, sources = seen_by_ranks([8] * 12, 12, 3, seed=0, epoch=0)
    assert [len(source.touched()) for source in sources] == [4, 4, 4]
    assert set.union(*(source.touched() for source in sources)) == set(range(12))
    _, later = seen_by_ranks([8] * 12, 12, 3, seed=0, epoch=1)
    assert [source.touched() for source in later] != [source.touched() for source in sources]


@pytest.mark.parametrize("files", [[60], [20, 0, 30, 10]])
def test_an_order_is_of_one_seed_and_one_epoch(files):
    orders = {(seed, epoch): np.concatenate(numbers(Batches(Numbers(files), 7, seed=seed).epoch(epoch)))
              for seed in (0, 1) for epoch in (0, 1)}  # fmt: skip
    for one, other in itertools.combinations(orders.values(), 2):
        assert not np.array_equal(one, other)
    again = np.concatenate(numbers(Batches(Numbers(files), 7, seed=1).epoch(1)))
    np.testing.assert_array_equal(again, orders[1, 1])
    unshuffled = np.concatenate(numbers(Batches(Numbers(files), 7, shuffle=False).epoch(1)))
    np.testing.assert_array_equal(unshuffled, np.arange(60))


def test_a_batch_is_of_all_files():
    """One class a file is as good as any other division."""
    first = next(iter(Batches(Numbers([50] * 4), 40)))["number"].numpy()
    assert np.bincount(first // 50).tolist() == [10] * 4


def test_mirrored_replicas_get_the_rows_that_ranks_would_get(three):
    batches = Batches(Numbers([5, 3, 2]), 4)
    steps, _ = seen_by_ranks([5, 3, 2], 4, 3, seed=0, epoch=0)
    mirrored = [three.local_values(batch) for batch in three.distribute(batches)]
    np.testing.assert_equal([tuple(share["number"].numpy() for share in batch) for batch in mirrored], steps)


# Ahead of the loop -----------------------------------------------------------------------------------------------------


def readers():
    return [thread for thread in threading.enumerate() if thread.name.startswith("disttrain-input")]


class Slow(Numbers):
    """Later batches are there sooner."""

    def read(self, places):
        time.sleep(0.02 / (1 + places[0]))
        return super().read(places)


def test_batches_come_in_order_and_are_read_ahead():
    source = Slow([40])
    batches = iter(Batches(source, 4, shuffle=False))
    assert next(batches)["number"].numpy().tolist() == [0, 1, 2, 3]
    until = time.monotonic() + 5
    while len(source.places) < 3 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(source.places) >= 3  # though only one was asked for
    assert np.concatenate(numbers(batches)).tolist() == list(range(4, 40))
    assert len(source.places) == 10
    assert readers() == []


def test_no_reader_outlives_a_loop_that_is_left():
    def leave():
        for _ in Batches(Numbers([400]), 4):
            assert readers() != []
            raise KeyError("left")

    with pytest.raises(KeyError, match="left"):
        leave()
    assert readers() == []
    batches = iter(Batches(Numbers([400]), 4))
    next(batches)
    assert readers() != []
    del batches
    assert readers() == []


def test_what_reading_raises_is_raised_in_its_place():
    class BrokenError(Exception):
        pass

    def broken(batch):
        if 6 in batch["number"].numpy():
            raise BrokenError("of example 6")
        return batch

    batches = iter(Batches(Numbers([40]), 2, shuffle=False, map=broken))
    assert np.concatenate(numbers(itertools.islice(batches, 3))).tolist() == list(range(6))
    with pytest.raises(BrokenError, match="of example 6"):
        next(batches)
    assert readers() == []


def test_a_program_may_end_in_mid_epoch():
    program = "import numpy, disttrain.data as d; kept = iter(d.Batches(numpy.arange(1000), 2)); next(kept)"
    subprocess.run(
        [sys.executable, "-c", program], timeout=60, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )


def test_a_map_is_applied_to_what_is_read():
    batches = Batches(
        (np.arange(5), np.ones((5, 2))), 2, shuffle=False, map=lambda b: {"x": b[0] * 2, "y": b[1].numpy()}
    )
    assert [batch["x"].numpy().tolist() for batch in batches] == [[0, 2], [4, 6], [8]]
    assert next(iter(batches.share(1, 2).skip(2)))["y"].shape == (0, 2)


class Miscounted(Numbers):
    def __len__(self):
        return super().__len__() + 1


def test_what_would_lose_examples_is_an_error():
    dropping = Batches(np.arange(8), 4, map=lambda x: x[1:])
    with pytest.raises(DataError, match=r"map returned a tensor of shape \(3,\) for 4 examples"):
        next(iter(dropping))
    with pytest.raises(DataError, match="Miscounted: its files hold 7 examples, and its length is 8"):
        Batches(Miscounted([3, 4]), 2)
    with pytest.raises(DataError, match="the files hold no examples"):
        Batches(Numbers([0, 0]), 2)
    with pytest.raises(DataError, match="batch_size=0: a whole number of 1 or more"):
        Batches(np.arange(3), 0)


def test_arrays_on_disk_stay_there(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12.0).reshape(6, 2))
    on_disk = np.load(tmp_path / "x.npy", mmap_mode="r")
    batches = Batches({"x": on_disk}, 4, shuffle=False)
    assert batches.source._columns["x"] is on_disk
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in batches]), on_disk)


# TFRecords -------------------------------------------------------------------------------------------------------------

FEATURES = {
    "id": tf.io.FixedLenFeature([], tf.int64),
    "x": tf.io.FixedLenFeature([3], tf.float32),
    "words": tf.io.RaggedFeature(tf.string),
}


def example(number):
    return tf.train.Example(
        features=tf.train.Features(
            feature={
                "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[number])),
                "x": tf.train.Feature(float_list=tf.train.FloatList(value=[number, number / 3, -number])),
                "words": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"w\0"] * (number % 3))),
            }
        )
    ).SerializeToString()


def write_records(folder, files, compression=""):
    """Examples numbered through `files` of these sizes."""
    numbers = itertools.count()
    for i, size in enumerate(files):
        with tf.io.TFRecordWriter(str(folder / f"part-{i}.tfrecord"), compression) as writer:
            for number in itertools.islice(numbers, size):
                writer.write(example(number))
    return str(folder / "part-*.tfrecord")


def test_records_are_what_tensorflow_reads(tmp_path):
    pattern = write_records(tmp_path, [5, 0, 1, 7])
    source = TFRecords(pattern, FEATURES)
    assert source.files == [5, 0, 1, 7]
    files = [str(tmp_path / f"part-{i}.tfrecord") for i in range(4)]
    plain = tf.io.parse_example(list(tf.data.TFRecordDataset(files).as_numpy_iterator()), FEATURES)
    places = np.random.default_rng(0).permutation(13)
    read = source.read(places)
    for name in ("id", "x"):
        np.testing.assert_array_equal(read[name], plain[name].numpy()[places])
    assert read["words"].to_list() == [plain["words"].to_list()[place] for place in places]
    assert sorted(np.concatenate([batch["id"] for batch in Batches(source, 4)])) == list(range(13))
    none = source.read(places[:0])
    assert (none["x"].shape, none["x"].dtype, none["words"].shape[0]) == ((0, 3), tf.float32, 0)


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(("how", "said"), [
    (lambda path: os.truncate(path, path.stat().st_size - 1), "part-0.tfrecord is cut off within record 4, at byte"),
    (lambda path: os.truncate(path, 5), "part-0.tfrecord is cut off within record 0, at byte 5"),
    (lambda path: flip(path, 3), "part-0.tfrecord is no TFRecord file, or it is corrupt at its first byte"),
    (lambda path: flip(path, len(example(0)) + 16), f"part-0.tfrecord is corrupt at byte {len(example(0)) + 16}, where a rec"),
    (lambda path: flip(path, 20), "part-0.tfrecord is corrupt: the record at byte 0 is not what its checksum says"),
    (lambda path: path.write_text("id,x\n1,2\n3,4\n"), "part-0.tfrecord is no TFRecord file"),
    (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "part-0.tfrecord is compressed by gzip, and records"),
    (lambda path: path.write_bytes(zlib.compress(path.read_bytes())), "part-0.tfrecord is compressed by zlib, and records"),
    (lambda path: path.unlink(), "there is no file .*part-0.tfrecord in "),
])  # fmt: skip
def test_record_files_that_cannot_be_read(tmp_path, how, said):
    write_records(tmp_path, [5])
    how(tmp_path / "part-0.tfrecord")
    with pytest.raises(DataError, match=said):
        list(Batches(TFRecords(tmp_path / "part-0.tfrecord", FEATURES), 2, shuffle=False))


def test_records_that_change_while_they_are_used(tmp_path):
    source = TFRecords(write_records(tmp_path, [5]), FEATURES)
    os.truncate(tmp_path / "part-0.tfrecord", 30)
    with pytest.raises(DataError, match=r"part-0.tfrecord is corrupt: the record at byte 0"):
        source.read(np.arange(2))
    (tmp_path / "part-0.tfrecord").unlink()
    with pytest.raises(DataError, match=r"cannot read .*part-0.tfrecord: No such file"):
        source.read(np.arange(2))


def test_records_without_a_feature(tmp_path):
    pattern = write_records(tmp_path, [5, 2])
    with tf.io.TFRecordWriter(str(tmp_path / "part-1.tfrecord")) as writer:
        writer.write(example(5))
        writer.write(tf.train.Example().SerializeToString())
    said = (
        r"part-1.tfrecord: record 1 does not have the features that were asked for: Feature: \w+ .* could not be found$"
    )
    with pytest.raises(DataError, match=said):
        TFRecords(pattern, FEATURES).read(np.array([0, 6, 2]))


def test_a_file_named_twice_would_be_seen_twice(tmp_path):
    pattern = write_records(tmp_path, [1, 1])
    with pytest.raises(DataError, match=r"part-1.tfrecord is named twice"):
        TFRecords([pattern, tmp_path / "part-1.tfrecord"], FEATURES)


# Images ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Two classes, five images of 6 x 4 pixels, one of them in a folder of its own."""
    rng = np.random.default_rng(0)
    for name in ("dog/b.png", "dog/a.png", "cat/more/c.png", "cat/d.png", "cat/e.bmp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)).save(path)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def decoded(path, channels=3):
    return tf.io.decode_image(path.read_bytes(), channels, expand_animations=False).numpy() / np.float32(255)


def test_images_are_what_tensorflow_decodes(pictures):
    source = ImageFolder(pictures, (6, 4))
    assert source.classes == ["cat", "dog"]
    images, labels = source.read(np.array([4, 0, 1, 2, 3]))
    names = ["dog/b.png", "cat/d.png", "cat/e.bmp", "cat/more/c.png", "dog/a.png"]
    np.testing.assert_array_equal(images, [decoded(pictures / name) for name in names])
    assert (labels.dtype, labels.tolist()) == (np.int32, [1, 0, 0, 0, 1])
    none, no_labels = source.read(np.array([], int))
    assert (none.shape, none.dtype, no_labels.dtype) == ((0, 6, 4, 3), np.float32, np.int32)
    assert sorted(np.concatenate([batch[1] for batch in Batches(source, 2)])) == [0, 0, 0, 1, 1]


def test_images_of_another_size_and_in_grey(pictures):
    (image,), _ = ImageFolder(pictures, (3, 8)).read(np.array([3]))
    resized = tf.image.resize(decoded(pictures / "dog/a.png"), (3, 8), "bilinear", antialias=True)
    np.testing.assert_allclose(image, resized, atol=2 / 255)
    (grey,), _ = ImageFolder(pictures, (6, 4), channels=1).read(np.array([3]))
    np.testing.assert_allclose(grey[..., 0], decoded(pictures / "dog/a.png") @ [0.299, 0.587, 0.114], atol=1 / 255)
    assert grey.shape == (6, 4, 1)


def test_folders_of_images_that_cannot_be_read(pictures):
    path = pictures / "dog" / "a.png"
    content = path.read_bytes()
    for damaged in (b"", b"rubbish", content[: len(content) // 2], content[:50] + b"\0" + content[51:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read the image \S+dog/a.png: .+; replace it"):
            list(Batches(ImageFolder(pictures, (6, 4)), 5))
    Image.fromarray(np.full((6, 4), 40_000, np.uint16)).save(path)
    with pytest.raises(DataError, match=r"dog/a.png: it has more than 8 bits a channel"):
        ImageFolder(pictures, (6, 4)).read(np.array([3]))
    (pictures / "bird").mkdir()
    with pytest.raises(DataError, match="bird is a class without an image"):
        ImageFolder(pictures, (6, 4))
    with pytest.raises(DataError, match=r"cat/more holds no folders: it needs one for each class"):
        ImageFolder(pictures / "cat" / "more", (6, 4))
    with pytest.raises(DataError, match=r"cannot read the folder .*nowhere: No such file"):
        ImageFolder(pictures / "nowhere", (6, 4))
    with pytest.raises(DataError, match="channels=2: use one of 1, 3, 4"):
        ImageFolder(pictures, (6, 4), channels=2)


# Tables ----------------------------------------------------------------------------------------------------------------


def write_table(path, columns):
    import pyarrow as pa
    from pyarrow import csv, parquet

    (csv.write_csv if path.suffix == ".csv" else parquet.write_table)(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_the_numbers_in_them(tmp_path, suffix):
    rng = np.random.default_rng(0)
    a, b, y = rng.normal(size=9), rng.integers(0, 99, 9), rng.integers(0, 5, 9)
    for i, rows in enumerate([slice(0, 4), slice(4, 4), slice(4, 9)]):
        columns = {"b": b[rows], "name": np.array(["n"] * 9)[rows], "y": y[rows], "a": a[rows]}
        write_table(tmp_path / f"{i}.{suffix}", columns)
    source = Table(str(tmp_path / f"*.{suffix}"), inputs=["a", "b"], label="y")
    places = rng.permutation(9)
    x, labels = source.read(places)
    np.testing.assert_array_equal(x, np.stack([a, b], 1).astype("float32")[places])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(labels, y[places])
    assert labels.dtype == np.int32
    if suffix == "csv":
        plain = np.genfromtxt(tmp_path / "0.csv", delimiter=",", names=True, dtype=None, encoding="utf8")
        np.testing.assert_array_equal(source.read(np.arange(4))[0][:, 0], plain["a"].astype("float32"))
    none, no_labels = source.read(places[:0])
    assert (none.shape, no_labels.shape) == ((0, 2), (0,))
    regression = Table(tmp_path / f"0.{suffix}", inputs=["y"], label="a")
    assert regression.read(places[:0])[1].dtype == np.float32


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_that_cannot_be_used(tmp_path, suffix):
    columns = {"a": [1.0, None, 3.0], "s": ["x", "y", "z"], "y": [0, 1, 2], "big": [0, 2**40, 1]}
    path = write_table(tmp_path / f"t.{suffix}", columns)
    for inputs, label, said in (
        (["y", "q"], "y", rf"t.{suffix}: there must be one column 'q'; its columns are a, s, y, big"),
        (["a"], "y", rf"t.{suffix}: column 'a' has no value in row 1"),
        (["s"], "y", rf"t.{suffix}: column 's' is of string, and numbers are wanted"),
        (["y"], "s", rf"t.{suffix}: column 's' is of string"),
        (["y"], "big", r"column 'big' holds 1099511627776, which is no int32"),
    ):
        with pytest.raises(DataError, match=said):
            Table(path, inputs, label)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=rf"cannot read the table \S+t.{suffix}: "):
        Table(path, ["y"], "y")


def test_tables_of_another_kind_or_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.xls").touch()
    with pytest.raises(DataError, match=r"t.xls: a table is a file .csv, .csv.gz or .parquet"):
        Table(tmp_path / "t.xls", ["y"], "y")
    with pytest.raises(DataError, match=r"there is no file .*nothing\*.csv in "):
        Table(tmp_path / "nothing*.csv", ["y"], "y")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pyarrow, which is not installed: pip install 'disttrain\[tables\]'"):
        Table(tmp_path / "t.xls", ["y"], "y")


# Real ranks ------------------------------------------------------------------------------------------------------------


def test_three_ranks_train_on_every_record_once(tmp_path):
    """17 examples in batches of 8: the last one leaves two ranks without data."""
    pattern = write_records(tmp_path, [6, 0, 7, 4])
    result = launch("mpi", 3, "data_sources", pattern).check()
    batches = Batches(TFRecords(pattern, FEATURES), 8, seed=3)
    seen = [list(itertools.chain(*parts)) for parts in zip(*(r["seen"] for r in result.reports), strict=True)]
    assert seen == [batch["id"].numpy().tolist() for epoch in (0, 1) for batch in batches.epoch(epoch)]
    assert sorted(itertools.chain(*seen[:3])) == sorted(itertools.chain(*seen[3:])) == list(range(17))
    assert [report["seen"][2] == [] for report in result.reports] == [False, True, True]
    assert [report["examples"] for report in result.reports] == [34] * 3
    assert len({arrays["weights"].tobytes() for arrays in result.arrays}) == 1
    ((files, seeds),) = {tuple(report["said"]) for report in result.reports}  # the same on all ranks
    assert files.startswith("the ranks' data differ: rank 1 has 13 examples in 3 files (sizes ")
    assert "and rank 0 has 17 examples in 4 files" in files
    assert seeds.startswith("the ranks' data differ: rank 1 has a tf.data pipeline shuffled by (3, 8), and rank 0 has ")


# Pipelines of tf.data ---------------------------------------------------------------------------------------------------


def pipelines(**seed):
    """By what they do, each ending in batches of numbers up to 20."""
    numbers = tf.data.Dataset.range(20)
    shuffled = numbers.shuffle(20, **seed)
    return {
        "shuffle": shuffled.batch(8),
        "deep": numbers.cache().shuffle(7, **seed).map(lambda x: x).batch(8).prefetch(2),
        "part": tf.data.Dataset.zip((shuffled, numbers)).map(lambda x, y: x).batch(8),
    }


@pytest.mark.parametrize("name", ["shuffle", "deep", "part", "files", "sample"])
def test_ranks_refuse_a_pipeline_whose_order_is_drawn_by_chance(tmp_path, name):
    tf.random.set_seed(None)  # whatever other tests have set
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n")
    numbers = tf.data.Dataset.range(9)
    more = {
        "files": tf.data.Dataset.list_files(str(tmp_path / "*.txt")).batch(2),
        "sample": tf.data.Dataset.sample_from_datasets([numbers, numbers], [0.5, 0.5]).batch(2),
    }
    by_chance = {**pipelines(), **more}[name]
    for rank in range(2):
        with pytest.raises(
            DataError, match=r"shuffled without a seed: every rank .* Give `shuffle` a seed, and `list_files`"
        ):
            Rank(rank, 2).distribute(by_chance)
    assert len(list(Rank(0, 1).distribute(by_chance))) > 1


@pytest.mark.parametrize("name", ["shuffle", "deep", "part"])
@pytest.mark.parametrize("by", ["shuffle", "set_seed"])
def test_ranks_share_a_pipeline_that_is_seeded(name, by):
    """Each has one of its own, as processes have."""
    seen = []
    for rank in range(3):
        tf.random.set_seed(5 if by == "set_seed" else None)
        pipeline = pipelines(**({"seed": 3} if by == "shuffle" else {}))[name]
        seen += [share.numpy() for share in Rank(rank, 3).distribute(pipeline)]
    tf.random.set_seed(None)
    assert sorted(np.concatenate(seen)) == list(range(20))


def later_orders(again=True):
    """Pipelines that shuffle anew in every iteration, by their stages, and whether that order can be found again."""
    numbers = tf.data.Dataset.range(24)
    shuffled = numbers.shuffle(24, seed=3, reshuffle_each_iteration=again)
    two = lambda x: tf.data.Dataset.from_tensors(x).repeat(2)  # noqa: E731
    ragged = lambda x: tf.ragged.range(x % 3)  # noqa: E731
    return {
        "batch": (shuffled.batch(5), True),
        "batch in parallel": (shuffled.batch(5, num_parallel_calls=2).prefetch(2), True),
        "map": (shuffled.map(lambda x: x + 1).map(lambda x: x, num_parallel_calls=2).padded_batch(5), True),
        "filter": (shuffled.filter(lambda x: x > 3).take(20).skip(1).shard(2, 0).batch(3), True),
        "rebatch": (shuffled.batch(5).unbatch().batch(4).rebatch(3), True),
        "ragged": (shuffled.map(ragged).ragged_batch(5).map(tf.RaggedTensor.to_tensor), True),
        "buckets": (shuffled.bucket_by_sequence_length(lambda x: tf.cast(x % 4, tf.int32), [2], [3, 4]), True),
        "window": (shuffled.window(5).flat_map(lambda window: window.batch(5)), True),
        "scan": (shuffled.scan(tf.constant(0, tf.int64), lambda s, x: (s + x, s + x)).unique().batch(5), True),
        "while": (shuffled.take_while(lambda x: x != 7).batch(5), True),
        "zip": (tf.data.Dataset.zip(shuffled, numbers.shuffle(9, seed=4)).map(lambda x, y: x * 100 + y).batch(5), True),
        "enumerate": (shuffled.enumerate().map(lambda i, x: i * 100 + x).batch(5), True),
        "interleave": (shuffled.interleave(two, cycle_length=3).shuffle(9, seed=5).batch(5), True),
        "interleave in parallel": (shuffled.interleave(two, num_parallel_calls=2).batch(5), True),
        "flat": (shuffled.flat_map(two).ignore_errors().batch(5), True),
        "after a cache": (numbers.cache().shuffle(24, seed=3).batch(5), True),
        "options": (
            shuffled.apply(tf.data.experimental.assert_cardinality(24)).batch(5).with_options(tf.data.Options()),
            True,
        ),
        "cache": (shuffled.cache().shuffle(24, seed=4).batch(5), True),
        "concatenate": (numbers.concatenate(shuffled).concatenate(shuffled).batch(5), True),
        "sample": (tf.data.Dataset.sample_from_datasets([shuffled, shuffled], seed=3).batch(5), False),
        "repeat": (shuffled.repeat(2).batch(5), False),
    }


def order(dataset):
    return [batch.tolist() for batch in dataset.as_numpy_iterator()]


@pytest.mark.parametrize("stages", later_orders())
def test_a_new_process_finds_the_order_of_a_later_iteration_where_it_says_so(stages):
    pipeline, found = later_orders()[stages]
    wanted = [order(pipeline) for _ in range(4)]
    assert wanted[0] != wanted[3]
    assert can_pass_over(pipeline) == found
    again, _ = later_orders()[stages]
    pass_over(again, 3)
    assert (order(again) == wanted[3]) == found
    if found:
        again, _ = later_orders()[stages]
        pass_over(again, 2)
        assert order(again.skip(2)) == wanted[2][2:]
    assert can_pass_over(later_orders(again=False)[stages][0])


def test_files_in_an_order_that_is_found_again(tmp_path):
    for number in range(7):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n")

    def make():
        files = tf.data.Dataset.list_files(str(tmp_path / "*.txt"), seed=3)
        return files.interleave(tf.data.TextLineDataset, num_parallel_calls=2).shuffle(5, seed=4).batch(2)

    pipeline, again = make(), make()
    wanted = [order(pipeline) for _ in range(3)]
    assert can_pass_over(pipeline)
    pass_over(again, 2)
    assert order(again) == wanted[2] != wanted[1]


# What is on every machine -----------------------------------------------------------------------------------------------


def test_digits_are_split_without_overlap_and_in_proportion():
    train, held_out = digits.load()
    assert (len(train.images), len(held_out.images)) == (1437, 360)
    assert train.images.shape[1:] == (8, 8, 1)
    assert (train.images.min(), train.images.max()) == (0.0, 1.0)
    seen = {image.tobytes() for image in train.images}
    assert sum(image.tobytes() in seen for image in held_out.images) == 0
    assert np.bincount(held_out.labels).min() >= 34
    assert set(train.only(range(5)).labels) == set(range(5))


def test_windows_predict_the_next_byte():
    content = np.arange(25, dtype=np.uint8)
    inputs, following = text.windows(content, 8)
    assert inputs.shape == following.shape == (3, 8)
    assert (following == inputs + 1).all()
    assert len(text.windows(content, 8, limit=2)[0]) == 2
    with pytest.raises(DataError, match="the text has 25 bytes; at least 26 are needed"):
        text.windows(content, 25)


def test_the_standard_library_is_a_text():
    content = text.read()
    assert len(content) > 3_000_000
    assert b"def " in content[:1_000_000].tobytes()


def test_unusable_texts(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(DataError, match="empty is empty"):
        text.read(tmp_path / "empty")
    with pytest.raises(DataError, match="Is a directory"):
        text.read(tmp_path)
