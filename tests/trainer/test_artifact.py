"""The archive of weights: what goes in comes out, the same way each time, and nothing hostile comes out at all."""

from __future__ import annotations

import gzip
import io
import json
import random
import tarfile
import zipfile

import pytest
import torch
from peft import LoraConfig

from preprocessing.errors import UserError
from trainer import artifact


def manifest(**fields) -> artifact.Manifest:
    values = {
        "base_model": "toybox",
        "base_hash": "0",
        "family": "stable_diffusion",
        "method": "pivotal",
        "trigger_word": "TOK",
        "tokens": ["<s0>", "<s1>"],
        "settings": {"learning_rate": 1e-4, "preview_prompts": ["a", "b"]},
        "dataset_hash": "1",
        "step": 7,
        "created": "2024-05-06T07:08:09+00:00",
        "libraries": artifact.library_versions(),
    }
    return artifact.Manifest.model_validate(values | fields)


def finished(folder):
    folder.mkdir()
    artifact.write_manifest(folder, manifest())
    artifact.save_tensors(folder / "adapter.safetensors", {"unet.a.lora_A.weight": torch.ones(2, 3)})
    (folder / "samples").mkdir()
    (folder / "samples" / "00.png").write_bytes(b"picture")
    (folder / "comfyui").mkdir()
    artifact.save_tensors(folder / "comfyui" / "adapter.safetensors", {"b": torch.zeros(1)})
    (folder / "captions.jsonl").write_text('{"caption": "TOK"}\n', encoding="utf-8")
    return folder


def packed(path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w", **options):
    """A tar of any members; a manifest is always among them."""
    good = tarfile.TarInfo("manifest.json")
    content = manifest().model_dump_json().encode()
    with tarfile.open(path, mode, **options) as tar:
        for member, data in [(good, content), *members]:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


def refused(path, pattern: str, limits: artifact.Limits = artifact.LIMITS) -> None:
    with pytest.raises(UserError, match=pattern) as caught, artifact.opened(path, limits):
        pass
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip_keeps_known_members_only(tmp_path):
    folder = finished(tmp_path / "done")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "state.safetensors").write_bytes(b"x" * 1000)
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    archive = tmp_path / "trained_model.tar"
    artifact.write(folder, archive)
    with artifact.opened(archive) as unpacked:
        names = sorted(path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file())
        assert names == [
            "adapter.safetensors",
            "captions.jsonl",
            "comfyui/adapter.safetensors",
            "manifest.json",
            "samples/00.png",
        ]
        assert all((unpacked / name).read_bytes() == (folder / name).read_bytes() for name in names)
        assert artifact.read_manifest(unpacked) == manifest()
    assert not unpacked.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "trained_model.tar"]


def test_the_same_job_gives_the_same_bytes(tmp_path):
    archives = []
    for name in ("one", "two"):
        folder = finished(tmp_path / name)
        (folder / "manifest.json").touch()
        artifact.write(folder, tmp_path / f"{name}.tar")
        archives.append((tmp_path / f"{name}.tar").read_bytes())
    assert archives[0] == archives[1]
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.mode, m.uname) for m in tar} == {(0, 0, 0, 0o644, "")}
        assert tar.getnames() == sorted(tar.getnames())


def test_a_header_of_many_entries_is_the_same_each_time(tmp_path):
    tensors = {"b": torch.rand(3, 2), "a": torch.ones(2, dtype=torch.bfloat16)}
    header = {f"key {i}": f'"\\ \u00e9 \n \x07 {i}' for i in range(20)}
    for name in ("one", "two"):
        artifact.save_tensors(tmp_path / name, tensors, header)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded, described = artifact.load_tensors(tmp_path / "one")
    assert described == header | {"format": "pt"}
    assert all(torch.equal(loaded[key], tensors[key]) and loaded[key].dtype == tensors[key].dtype for key in tensors)


def test_tensors_may_be_views_and_parameters(tmp_path):
    tensors = {"t": torch.nn.Parameter(torch.arange(6.0).reshape(2, 3)).t()}
    artifact.save_tensors(tmp_path / "t.safetensors", tensors)
    (tmp_path / "other").touch()
    assert (tmp_path / "t.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert torch.equal(artifact.load_tensors(tmp_path / "t.safetensors")[0]["t"], tensors["t"].detach())


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "t.safetensors"
    artifact.save_tensors(path, {"a": torch.ones(1)})
    shared = torch.ones(4)
    with pytest.raises(RuntimeError):
        artifact.save_tensors(path, {"a": shared, "b": shared})
    assert list(artifact.load_tensors(path)[0]) == ["a"]
    assert list(tmp_path.iterdir()) == [path]


def test_an_unfinished_folder_is_a_bug(tmp_path):
    with pytest.raises(FileNotFoundError, match="not finished"):
        artifact.write(tmp_path, tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def test_a_member_that_could_not_be_read_back_is_not_packed(tmp_path):
    folder = finished(tmp_path / "done")
    (folder / "samples" / "a picture.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a picture\.png: not a plain relative name"):
        artifact.write(folder, tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def test_a_folder_is_its_own_archive(tmp_path):
    folder = finished(tmp_path / "done")
    with artifact.opened(folder) as same:
        assert same == folder
    assert (folder / "manifest.json").exists()


@pytest.mark.parametrize("options", [{}, {"format": tarfile.PAX_FORMAT}, {"mode": "w:gz"}])
def test_archives_packed_by_others_are_read(tmp_path, options):
    folder = tarfile.TarInfo("./samples/")
    folder.type = tarfile.DIRTYPE
    picture = tarfile.TarInfo("./samples/00.png")
    picture.mtime = 1700000000.25  # a fraction needs a long header in pax
    path = packed(tmp_path / "any_name", [(folder, b""), (picture, b"picture")], **options)
    with artifact.opened(path) as unpacked:
        assert (unpacked / "samples" / "00.png").read_bytes() == b"picture"


def test_the_folder_is_removed_when_its_user_fails(tmp_path):
    path = packed(tmp_path / "x.tar", [])
    with pytest.raises(ZeroDivisionError), artifact.opened(path) as unpacked:
        raise ZeroDivisionError
    assert not unpacked.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../x.png",
        "/etc/x.png",
        "samples/../../x.png",
        "samples//x.png",
        "C:\\x.png",
        "samples/.hidden.png",
        "a/b/c/d/e.png",
        "n" * 120 + ".png",
        "caf\u00e9.png",
        "new\nline.png",
        "sp ace.png",
        "~/x.png",
        "-rf.png",
        "",
    ],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    refused(packed(tmp_path / "x.tar", [(entry(name), b"x")]), "not a plain relative name")


@pytest.mark.parametrize("name", ["weights.pt", "unet/model.bin", "a.ckpt", "b.pkl", "C.PTH", "embeddings.pickle"])
def test_pickles_are_refused(tmp_path, name):
    refused(packed(tmp_path / "x.tar", [(entry(name), b"x")]), "a pickle, which could run code")


@pytest.mark.parametrize("name", ["run.sh", "code.py", "adapter", "x.safetensors.exe", "notes.txt"])
def test_members_of_other_kinds_are_refused(tmp_path, name):
    refused(packed(tmp_path / "x.tar", [(entry(name), b"x")]), "no part of an archive of weights")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, b"Z"],
)
def test_anything_but_regular_files_is_refused(tmp_path, kind):
    path = packed(tmp_path / "x.tar", [(entry("x.png", kind, "/etc/passwd"), b"")])
    refused(path, "not a regular file")


def test_a_link_cannot_redirect_a_later_member(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    link = entry("samples", tarfile.SYMTYPE, str(outside))
    refused(packed(tmp_path / "x.tar", [(link, b""), (entry("samples/x.png"), b"x")]), "samples")
    assert not any(outside.iterdir())


@pytest.mark.parametrize("names", [("a.png", "a.png"), ("a.png", "./a.png"), ("a.png", "A.PNG"), ("./manifest.json",)])
def test_a_name_comes_once(tmp_path, names):
    refused(packed(tmp_path / "x.tar", [(entry(name), b"x") for name in names]), "twice")


def test_a_name_is_a_file_or_a_folder(tmp_path):
    refused(packed(tmp_path / "x.tar", [(entry("a.png"), b"x"), (entry("A.png/b.png"), b"x")]), "both as a file")


def test_no_manifest(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("config.yaml"))
    refused(tmp_path / "x.tar", "has no manifest.json")


def test_limits(tmp_path):
    small = artifact.Limits(members=3, total_bytes=6000, other_bytes=1000, ratio=5, free_bytes=4000)
    refused(packed(tmp_path / "a", [(entry(f"{i}.png"), b"") for i in range(3)]), "more than 3 members", small)
    refused(packed(tmp_path / "b", [(entry("big.png"), b"x" * 1001)]), "1001 bytes where at most 1000", small)
    refused(packed(tmp_path / "c", [(entry("big.safetensors"), b"x" * 6000)]), "more than 6000 bytes", small)
    bomb = packed(tmp_path / "d", [(entry("big.safetensors"), bytes(4500))], "w:gz")
    refused(bomb, "more than 5 times its size", small)
    with artifact.opened(packed(tmp_path / "e", [(entry("big.safetensors"), bytes(4000))], "w"), small):
        pass


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path):
    """A header that declares a terabyte is enough: no more than it is read."""
    huge = tarfile.TarInfo("big.safetensors")
    huge.size = 10**12
    body = gzip.compress(huge.tobuf(tarfile.GNU_FORMAT))
    (tmp_path / "x.tar").write_bytes(body)
    refused(tmp_path / "x.tar", "has 1000000000000 bytes where at most")
    huge.size = 10**10
    (tmp_path / "x.tar").write_bytes(gzip.compress(huge.tobuf(tarfile.GNU_FORMAT)))
    refused(tmp_path / "x.tar", "more than 100 times its size")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_endless_long_header_is_not_read(tmp_path, kind):
    header = entry("x", kind)
    header.size = 2**30
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.GNU_FORMAT) + bytes(4096))
    refused(tmp_path / "x.tar", "a header of 1073741824 bytes")


def test_long_headers_without_end_do_not_exhaust_the_stack(tmp_path):
    header = entry("x", tarfile.XHDTYPE)
    (tmp_path / "x.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) * 5000)
    refused(tmp_path / "x.tar", "not a whole tar")


def test_a_negative_size_from_a_pax_header_ends(tmp_path):
    member = entry("x.png")
    member.pax_headers = {"size": "-512"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    refused(tmp_path / "x.tar", "x.png|not a whole tar")


def test_sparse_members_are_refused(tmp_path):
    member = entry("x.safetensors")
    member.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.map": "0,1", "GNU.sparse.size": "99"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(member)
    refused(tmp_path / "x.tar", "not a regular file")


def test_what_is_no_tar(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    (tmp_path / "noise.tar").write_bytes(random.Random(0).randbytes(4096))
    (tmp_path / "text.tar").write_text("hello", encoding="utf-8")
    (tmp_path / "gz.tar").write_bytes(gzip.compress(b"hello"))
    with zipfile.ZipFile(tmp_path / "zip.tar", "w") as archive:
        archive.writestr("manifest.json", "{}")
    packed(tmp_path / "xz.tar", [], "w:xz")
    for path in tmp_path.iterdir():
        refused(path, "not a whole tar")
    refused(tmp_path / "absent.tar", "does not exist")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_truncated_archive_is_never_taken_for_whole(tmp_path, mode):
    content = random.Random(0).randbytes(2000)
    members = [(entry("a.safetensors"), content), (entry("b.png"), content)]
    whole = packed(tmp_path / "whole", members, mode).read_bytes()
    end = 512 * 11 if mode == "w" else len(whole)  # past the last member: the padding is no loss
    for length in range(0, end, 97):
        (tmp_path / "cut").write_bytes(whole[:length])
        refused(tmp_path / "cut", "not a whole tar|cut short|has no manifest")


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_damage_gives_a_user_error_or_the_same_members(tmp_path, mode):
    """A plain tar has no checksum of its members' bytes; a tar.gz has."""
    rng = random.Random(0)
    content = rng.randbytes(3000)
    members = [(entry("a.safetensors"), content), (entry("b.png"), b"x")]
    whole = packed(tmp_path / "whole", members, mode).read_bytes()
    outcomes = {"refused": 0, "read": 0}
    for _ in range(120):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        (tmp_path / "damaged").write_bytes(damaged)
        try:
            with artifact.opened(tmp_path / "damaged") as unpacked:
                found = {path.name: path.read_bytes() for path in unpacked.rglob("*")}
            assert set(found) == {"manifest.json", "a.safetensors", "b.png"}
            assert mode == "w" or found["a.safetensors"] == content
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 0


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("{", "damaged"),
        ("[" * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        ("[]", "format None"),
        ('{"format_version": 2}', "format 2, and this program reads format 1"),
        ('{"format_version": 1}', "base_model: Field required"),
        (manifest().model_dump_json()[:-1] + ', "extra": 1}', "extra: Extra inputs"),
        (manifest().model_dump_json().replace('"step":7', '"step":"x"'), "step: Input should be"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path, text, pattern):
    (tmp_path / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=pattern) as caught:
        artifact.read_manifest(tmp_path)
    assert "manifest.json" in str(caught.value)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(UserError, match=r"has no manifest\.json"):
        artifact.read_manifest(tmp_path)


def test_damaged_tensors_are_the_users_to_mend(tmp_path):
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(UserError, match=r"adapter\.safetensors is missing"):
        artifact.load_tensors(path)
    artifact.save_tensors(path, {"a": torch.ones(64)})
    whole = path.read_bytes()
    for content in (b"", b"hello", whole[:-4], whole[:20], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter\.safetensors is not a whole"):
            artifact.load_tensors(path)


def test_a_lora_config_survives_json():
    config = LoraConfig(
        r=8, lora_alpha=3, target_modules=["to_k", "conv1"], use_dora=True, init_lora_weights="gaussian",
        rank_pattern={"to_k": 4}, alpha_pattern={"to_k": 2.0}, trainable_token_indices={"token_embedding": [7, 8]},
    )  # fmt: skip
    stored = json.loads(json.dumps(artifact.lora_config_dict(config)))
    assert LoraConfig(**stored) == config
    assert stored["target_modules"] == ["conv1", "to_k"]


def test_the_adapters_header_covers_the_adapted_nets_only():
    nets = {net: {"r": 4, "lora_alpha": 2.0} for net in ("unet", "text_encoder")}
    described = manifest(nets=nets)
    header = artifact.adapter_header({"unet.a.lora_A.weight": torch.ones(4, 1)}, described)
    assert json.loads(header["lora_adapter_metadata"]) == {"unet.r": 4, "unet.lora_alpha": 2.0}
    assert (json.loads(header["rank"]), json.loads(header["alpha"])) == ({"unet": 4}, {"unet": 2.0})
    assert header["trigger_word"] == "TOK"
    assert "lora_adapter_metadata" not in artifact.adapter_header({"unet.a.weight": torch.ones(1)}, described)
    with pytest.raises(KeyError):
        artifact.adapter_header({"unet.a.lora_A.weight": torch.ones(4, 1)}, manifest())
