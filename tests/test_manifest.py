"""Bundle manifests: what is written, what is read, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensembler.protocol import manifest as manifests
from ensembler.protocol.codec import AffineCodec
from ensembler.protocol.errors import BundleError, BundleTamperedError, BundleVersionError
from ensembler.protocol.manifest import (
    MANIFEST_NAME,
    ClientManifest,
    FileEntry,
    ImageSpec,
    ModelPair,
    PartySpec,
    SealSpec,
    ServerManifest,
    WireSpec,
    describe_file,
    load_client,
    load_server,
    parse_client,
    parse_server,
    to_json,
)

WIRE = WireSpec(
    bodies_id="0123456789abcdef" * 4,
    feature_shape=(16, 8, 8),
    feature_codec=AffineCodec.from_range(-0.4, 3.1),
    answer_width=128,
    answer_codecs=tuple(AffineCodec.from_range(0.0, high) for high in (1.1, 2.2, 3.3)),
)


def entry(content=b""):
    return FileEntry(size_bytes=len(content), sha256="ab" * 32)


SERVER = ServerManifest(
    wire=WIRE,
    precision="int8",
    bodies=("body_00.onnx", "body_01.onnx", "body_02.onnx"),
    files={f"body_{i:02d}.onnx": entry(bytes(i)) for i in range(3)},
)
CLIENT = ClientManifest(
    wire=WIRE,
    image=ImageSpec(height=32, width=48),
    labels=("cat", "dog", "Füchsin 🦊"),
    noise_mode="fixed",
    noise_std=0.1,
    precision="int8",
    models=(
        ModelPair(head="head.tflite.sealed", tail="tail.tflite.sealed"),
        ModelPair(head="head.onnx", tail="tail.onnx"),
    ),
    parties=(
        PartySpec(bodies_id="cd" * 32, num_nets=1, server_public_key="rq:rM>}U?@Lns47E1%kR.o@n%FcmmsL/@{H8]yf7"),
        PartySpec(bodies_id="ef" * 32, num_nets=2, server_public_key="A" * 40),
    ),
    files={
        "head.onnx": entry(b"h"),
        "tail.onnx": entry(b"t"),
        "head.tflite.sealed": entry(b"H"),
        "tail.tflite.sealed": entry(b"T"),
    },
    encryption=SealSpec(kdf="scrypt", salt="5a" * 32, log2_n=15, p=3),
)
KINDS = {"client": (CLIENT, parse_client, load_client), "server": (SERVER, parse_server, load_server)}
both = pytest.mark.parametrize("kind", KINDS)


def document(kind):
    return json.loads(to_json(KINDS[kind][0]))


def parse(kind, content):
    """Reads a manifest of ``kind`` from bytes or a JSON document."""
    return KINDS[kind][1](content if isinstance(content, bytes) else json.dumps(content).encode())


def paths(node, path=()):
    """Yields the path of every value inside a JSON document."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from paths(value, (*path, key))


def parent(node, path):
    for key in path[:-1]:
        node = node[key]
    return node


def with_value(kind, path, value):
    changed = document(kind)
    parent(changed, path)[path[-1]] = value
    return changed


def field_name(path):
    """Returns the innermost name on a path: an error about a list's item names the list."""
    return [key for key in path if isinstance(key, str)][-1]


# --- round trip ---


def test_one_format_alone_is_written_as_it_always_was():
    alone = dataclasses.replace(CLIENT, models=CLIENT.models[1:])
    written = json.loads(to_json(alone))
    assert (written["head"], written["tail"], "also" in written) == ("head.onnx", "tail.onnx", False)
    assert parse_client(to_json(alone)).models == alone.models


def test_two_pairs_of_one_format_are_refused():
    changed = document("client")
    changed["also"] = {"head": "head.tflite.sealed", "tail": "tail.tflite.sealed"}
    with pytest.raises(BundleError, match="also has models of the same format as head and tail"):
        parse("client", changed)


TORCH = dataclasses.replace(
    SERVER, bodies=("b.json", "b.safetensors"), files={"b.json": entry(), "b.safetensors": entry()}, format="torch"
)


def test_bodies_in_onnx_are_written_as_they_always_were():
    assert "bodies_format" not in document("server")
    assert json.loads(to_json(TORCH))["bodies_format"] == "torch"
    assert parse_server(to_json(TORCH)) == TORCH


@pytest.mark.parametrize("bodies", [["b.json"], ["b.json", "b.json"], ["b.json", "b.safetensors", "b.json"]])
def test_bodies_in_torch_are_two_files(bodies):
    with pytest.raises(BundleError, match="bodies does not name 2 of the bundle's files"):
        parse("server", json.loads(to_json(TORCH)) | {"bodies": bodies})


@both
def test_a_manifest_is_read_as_it_was_written(kind):
    written = KINDS[kind][0]
    assert parse(kind, to_json(written)) == written


@pytest.mark.parametrize(
    "changes",
    [
        {"parties": (PartySpec(bodies_id=WIRE.bodies_id, num_nets=3, server_public_key=None),)},
        {"noise_mode": "none", "noise_std": 0.0},
        {"noise_mode": "fresh", "noise_std": 0.25},
        {"noise_mode": "fresh", "noise_law": "uniform"},
        {"noise_mode": "drawn", "noise_tensors": 8},
        {"dropout": 0.3},
        {"precision": "float32"},
        {"labels": tuple(str(i) for i in range(1000))},
    ],
)
def test_every_variant_of_a_client_manifest_is_read_as_it_was_written(changes):
    written = dataclasses.replace(CLIENT, **changes)
    assert parse("client", to_json(written)) == written


def test_a_manifest_says_nothing_of_what_its_client_does_not_do():
    # Sealed files bind these bytes: they must stay those of before there were such fields.
    assert not {"noise_law", "noise_tensors", "dropout"} & document("client").keys()


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"noise_law": "cauchy"}, "noise_law"),
        ({"noise_law": None}, "noise_law"),
        ({"noise_mode": "drawn"}, "noise_tensors"),
        ({"noise_mode": "drawn", "noise_tensors": 1025}, "noise_tensors"),
        ({"noise_mode": "drawn", "noise_tensors": 2.0}, "noise_tensors"),
        ({"noise_mode": "fresh", "noise_tensors": 2}, "noise_tensors"),
        ({"dropout": 1}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"dropout": "0.3"}, "dropout"),
        ({"dropout": True}, "dropout"),
    ],
)
def test_an_impossible_kind_of_noise_is_refused_by_field(changes, name):
    with pytest.raises(BundleError, match=f"{name} has an invalid value"):
        parse("client", document("client") | changes)


float32_scales = st.floats(2.0**-40, 2.0**40, width=32)
bits = st.sampled_from([8, 4, 3, 2, 1])


def codecs_of(bits):
    zero_points = st.integers(0, 2**bits - 1)
    return st.builds(AffineCodec, scale=float32_scales, zero_point=zero_points, bits=st.just(bits))


any_wire = st.builds(
    WireSpec,
    bodies_id=st.text("0123456789abcdef", min_size=64, max_size=64),
    feature_shape=(
        st.lists(st.integers(1, 90), min_size=1, max_size=4) | st.lists(st.integers(1, 1 << 20), min_size=1, max_size=1)
    ).map(tuple),
    feature_codec=bits.flatmap(codecs_of),
    answer_width=st.integers(1, 1 << 20),
    answer_codecs=bits.flatmap(lambda bits: st.lists(codecs_of(bits), min_size=1, max_size=5).map(tuple)),
)


@given(any_wire, st.lists(st.text(max_size=20), min_size=1, max_size=5), st.floats(0, 999_999))
def test_any_valid_client_manifest_is_read_as_it_was_written(wire, labels, noise_std):
    rest = wire.num_nets - 1
    parties = [PartySpec(bodies_id="ab" * 32, num_nets=n, server_public_key=None) for n in (1, rest) if n]
    if not rest:
        parties = [dataclasses.replace(parties[0], bodies_id=wire.bodies_id)]
    written = dataclasses.replace(CLIENT, wire=wire, labels=tuple(labels), noise_std=noise_std, parties=tuple(parties))
    assert parse("client", to_json(written)) == written


@given(any_wire)
def test_any_valid_server_manifest_is_read_as_it_was_written(wire):
    names = tuple(f"body_{i}.onnx" for i in range(wire.num_nets))
    written = dataclasses.replace(SERVER, wire=wire, bodies=names, files={name: entry() for name in names})
    assert parse("server", to_json(written)) == written


@both
def test_equal_manifests_are_equal_bytes(kind):
    written = KINDS[kind][0]
    backwards = dataclasses.replace(written, files=dict(reversed(written.files.items())))
    assert list(backwards.files) != list(written.files)
    assert to_json(backwards) == to_json(written) == to_json(copy.deepcopy(written))


@both
def test_the_bytes_are_sorted_utf8_that_ends_with_a_newline(kind):
    content = to_json(KINDS[kind][0])
    assert content.endswith(b"}\n")
    loaded = json.loads(content.decode("utf-8"))
    assert json.dumps(loaded, indent=1, sort_keys=True, ensure_ascii=False) + "\n" == content.decode("utf-8")


def test_a_server_manifest_says_nothing_of_the_client():
    fields = {key for path in paths(document("server")) for key in path if isinstance(key, str)}
    secrets = {
        "labels",
        "noise_mode",
        "noise_std",
        "head",
        "tail",
        "selector",
        "server_public_key",
        "parties",
        "num_selected",
    }
    assert not fields & secrets


def test_answers_in_codecs_of_several_bits_are_refused():
    changed = document("server")
    changed["wire"]["answer_codecs"][1] |= {"codec": "u4", "zero_point": 0}
    with pytest.raises(BundleError, match="answer_codecs mixes codecs"):
        parse("server", changed)


def test_answers_that_no_message_could_hold_are_refused():
    changed = document("server")
    changed["wire"] |= {"answer_codecs": changed["wire"]["answer_codecs"][:1] * 65, "answer_width": 1 << 20}
    with pytest.raises(BundleError, match=r"wire\.answer_width times 65 nets is more than 67108864"):
        parse("server", changed)


def test_operators_that_do_not_hold_all_nets_together_are_refused():
    changed = document("client")
    changed["parties"][0]["num_nets"] = 2
    with pytest.raises(BundleError, match="parties do not hold 3 nets together"):
        parse("client", changed)


def test_a_single_operator_of_other_nets_is_refused():
    changed = document("client")
    changed["parties"] = [changed["parties"][0] | {"num_nets": 3}]
    with pytest.raises(BundleError, match=r"parties name other nets than wire\.bodies_id"):
        parse("client", changed)


# --- fields ---

HEADER_FIELDS = ("format", "version", "kind")  # these say which manifest it is, and have errors of their own
FIELDS = [(kind, path) for kind in KINDS for path in paths(document(kind)) if path[0] not in HEADER_FIELDS]
FIELD_IDS = [f"{kind}-{'.'.join(map(str, path))}" for kind, path in FIELDS]


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, path) for kind, path in FIELDS if isinstance(path[-1], str) and path[0] != "files" and path != ("also",)],
)
def test_a_missing_field_is_refused_by_name(kind, path):
    changed = document(kind)
    del parent(changed, path)[path[-1]]
    with pytest.raises(BundleError, match=field_name(path)):
        parse(kind, changed)


@pytest.mark.parametrize(("kind", "name"), [("client", "head"), ("client", "tail"), ("server", "bodies")])
def test_a_graph_that_the_bundle_does_not_list_is_refused_by_the_field_that_names_it(kind, name):
    changed = document(kind)
    named = changed[name] if kind == "client" else changed[name][0]
    del changed["files"][named]
    with pytest.raises(BundleError, match=name):
        parse(kind, changed)


@pytest.mark.parametrize("key", ["size_bytes", "sha256"])
@pytest.mark.parametrize(("kind", "name"), [("client", "head.onnx"), ("server", "body_01.onnx")])
def test_a_file_without_size_or_digest_is_refused(kind, name, key):
    changed = document(kind)
    del changed["files"][name][key]
    with pytest.raises(BundleError, match=f"files.{name}.{key}"):
        parse(kind, changed)


MANGLED = {
    "null": None,
    "true": True,
    "negative": -1,
    "fraction": 0.3,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "400 digits": 10**400,
    "empty text": "",
    "text": "no",
    "long text": "x" * 1001,
    "half a character": "\ud800",
    "text like a key": " " * 40,
    "empty list": [],
    "list": [None],
    "deep list": [[[]]],
    "empty object": {},
    "object": {"x": 1},
}


def is_allowed(path, value):
    """Whether a mangled value happens to be one that the field may have."""
    if path[0] == "labels" and len(path) == 2:
        return isinstance(value, str) and len(value) <= 1000 and value != "\ud800"
    return (path[-1] in ("server_public_key", "encryption") and value is None) or (
        path == ("noise_std",) and value == 0.3
    )


@pytest.mark.parametrize(("kind", "path"), FIELDS, ids=FIELD_IDS)
def test_a_mangled_field_is_refused_by_name(kind, path):
    # A file list emptied by the change is noticed by the field that names its first file.
    names = [field_name(path)] if path[0] != "files" else [field_name(path), "files", "head", "bodies"]
    for what, value in MANGLED.items():
        changed = with_value(kind, path, value)
        if is_allowed(path, value):
            parse(kind, changed)
            continue
        with pytest.raises(BundleError) as caught:
            parse(kind, changed)
        assert any(name in str(caught.value) for name in names), what


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("client", ("image", "height"), 0),
        ("client", ("image", "width"), (1 << 14) + 1),
        ("client", ("noise_mode",), "sometimes"),
        ("client", ("precision",), "int4"),
        ("client", ("noise_std",), 1e6),
        ("client", ("parties", 0, "server_public_key"), "x" * 39),
        ("client", ("parties", 0, "server_public_key"), "é" * 40),
        ("client", ("parties", 0, "server_public_key"), "~" * 40),
        ("client", ("parties", 0, "server_public_key"), "\udcff" * 40),
        ("client", ("parties", 0, "server_public_key"), "A" * 40 + "\n"),
        ("client", ("parties", 0, "server_public_key"), "#" * 40),  # beyond 2^32
        ("client", ("labels",), ["cat", "\udcff"]),
        ("client", ("parties", 0, "num_nets"), 4),
        ("client", ("parties",), []),
        ("client", ("head",), "nowhere.onnx"),
        ("client", ("wire", "bodies_id"), "AB" * 32),
        ("client", ("wire", "bodies_id"), "ab" * 31),
        ("client", ("wire", "feature_shape"), [1] * 5),
        ("client", ("wire", "feature_shape"), [16, 0, 8]),
        ("client", ("wire", "feature_shape"), [16, (1 << 20) + 1]),
        ("client", ("wire", "feature_shape"), [1 << 20, 65]),
        ("client", ("wire", "feature_shape"), [1 << 20] * 4),
        ("client", ("wire", "feature_codec", "codec"), "u5"),
        ("client", ("wire", "feature_codec", "scale"), 0.1),  # not a float32 value
        ("client", ("wire", "feature_codec", "scale"), 1e300),
        ("client", ("wire", "feature_codec", "zero_point"), 256),
        ("client", ("files", "head.onnx", "sha256"), "AB" * 32),
        ("client", ("files", "head.onnx", "size_bytes"), 1 << 40),
        ("server", ("wire", "answer_width"), (1 << 20) + 1),
        ("server", ("wire", "answer_codecs"), [{}] * 1025),
        ("server", ("bodies_format",), "tensorflow"),
        ("server", ("bodies_format",), None),
        ("server", ("bodies",), ["body_00.onnx", "body_01.onnx"]),
        ("server", ("bodies",), ["body_00.onnx", "body_01.onnx", "body_01.onnx"]),
        ("server", ("bodies",), ["body_00.onnx", "body_01.onnx", "body_03.onnx"]),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(kind, path, value):
    with pytest.raises(BundleError, match=path[-1]):
        parse(kind, with_value(kind, path, value))


@both
def test_an_error_names_its_source(kind):
    changed = with_value(kind, ("precision",), None)
    with pytest.raises(BundleError, match=r"^/some/where: precision "):
        KINDS[kind][1](json.dumps(changed).encode(), "/some/where")


@both
@pytest.mark.parametrize("version", [2, 0, -1, 1.5, 10**50, "1", None, True, [1], {}])
def test_another_version_is_refused_as_such(kind, version):
    with pytest.raises(BundleVersionError, match="this package reads version 1"):
        parse(kind, with_value(kind, ("version",), version))


@both
def test_a_newer_version_is_told_whatever_else_it_changed(kind):
    with pytest.raises(BundleVersionError):
        parse(kind, {"format": "ensembler-bundle", "version": 2})


@pytest.mark.parametrize(("kind", "other"), [("client", "server"), ("server", "client")])
def test_a_bundle_of_the_other_kind_is_refused(kind, other):
    with pytest.raises(BundleError, match=f"belongs to a {other} bundle, a {kind} bundle is needed"):
        parse(kind, document(other))


@both
@pytest.mark.parametrize("value", [None, "", [], "Client"])
def test_an_unknown_kind_is_refused(kind, value):
    with pytest.raises(BundleError, match=f"a {kind} bundle is needed"):
        parse(kind, with_value(kind, ("kind",), value))


@both
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"nonsense", b"\xff\xfe", b"null", b"[]", b'"text"', b"{}", b'{"format": "zip"}', b"[" * 100_000],
)
def test_what_is_no_manifest_is_refused(kind, content):
    with pytest.raises(BundleError, match=r"manifest\.json is not"):
        parse(kind, content)


@both
@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "..",
        ".",
        "",
        ".hidden",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:x",
        "x\n",
        "x\0",
        "~",
        "é",
        "x" * 101,
        "manifest.json",
    ],
)
def test_a_file_name_that_could_reach_outside_the_bundle_is_refused(kind, name):
    changed = document(kind)
    changed["files"][name] = next(iter(changed["files"].values()))
    with pytest.raises(BundleError, match="files holds a name that is not a plain file name"):
        parse(kind, changed)


# --- fuzz ---

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def read_or_refuse(kind, content):
    """Parses ``content``; any exception but the bundle's own fails the test."""
    try:
        return parse(kind, content)
    except BundleError:
        return None


@given(st.sampled_from([*KINDS]), json_values)
def test_any_json_document_is_refused_as_a_bundle_error(kind, value):
    assert read_or_refuse(kind, value) is None


@given(st.sampled_from([*KINDS]), st.binary(max_size=200))
def test_any_bytes_are_refused_as_a_bundle_error(kind, content):
    assert read_or_refuse(kind, content) is None


@given(st.sampled_from(FIELDS), json_values)
def test_any_value_in_any_field_is_read_or_refused(field, value):
    kind, path = field
    read = read_or_refuse(kind, with_value(kind, path, value))
    if read is not None:  # what is accepted can be written again
        assert parse(kind, to_json(read)) == read


@given(
    st.sampled_from([*KINDS]),
    st.lists(st.tuples(st.integers(0, 100_000), st.integers(0, 255)), min_size=1, max_size=3),
)
def test_damaged_bytes_are_read_or_refused(kind, changes):
    content = bytearray(to_json(KINDS[kind][0]))
    for position, value in changes:
        content[position % len(content)] = value
    read = read_or_refuse(kind, bytes(content))
    if read is not None:
        assert parse(kind, to_json(read)) == read


# --- folders ---


@pytest.fixture(params=KINDS)
def bundle(request, tmp_path):
    """Yields ``(folder, loader, one file's path)`` of a bundle with small files."""
    manifest, _, load = KINDS[request.param]
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name in manifest.files:
        (folder / name).write_bytes(f"the graph {name}".encode())
    files = {name: describe_file(folder / name) for name in manifest.files}
    (folder / MANIFEST_NAME).write_bytes(to_json(dataclasses.replace(manifest, files=files)))
    return folder, load, folder / next(iter(manifest.files))


def test_a_whole_bundle_is_loaded(bundle):
    folder, load, file = bundle
    assert load(folder).files[file.name] == describe_file(file)


def test_describe_file_states_size_and_sha256(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert describe_file(tmp_path / "x") == FileEntry(
        size_bytes=3, sha256="ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_one_changed_bit_is_noticed(bundle):
    folder, load, file = bundle
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleTamperedError, match=file.name):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"longer than any graph that was here before"])
def test_a_file_of_another_length_is_noticed(bundle, content):
    folder, load, file = bundle
    file.write_bytes(content)
    with pytest.raises(BundleTamperedError, match="copy the bundle again"):
        load(folder)


def test_a_digest_changed_in_the_manifest_is_noticed(bundle):
    folder, load, file = bundle
    changed = json.loads((folder / MANIFEST_NAME).read_bytes())
    changed["files"][file.name]["sha256"] = "00" * 32
    (folder / MANIFEST_NAME).write_text(json.dumps(changed))
    with pytest.raises(BundleTamperedError):
        load(folder)


def test_files_that_the_manifest_does_not_list_are_no_part_of_the_bundle(bundle):
    folder, load, _ = bundle
    (folder / "README.txt").write_text("for people")
    assert "README.txt" not in load(folder).files


def test_a_missing_file_is_refused_by_name(bundle):
    folder, load, file = bundle
    file.unlink()
    with pytest.raises(BundleError, match=f"incomplete: {file.name} is missing"):
        load(folder)


def test_a_missing_manifest_is_refused_by_name(bundle):
    folder, load, _ = bundle
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(BundleError, match=f"is no bundle, or incomplete: {MANIFEST_NAME} is missing"):
        load(folder)


def test_a_folder_above_bundles_says_which_lie_in_it(bundle):
    folder, load, _ = bundle
    other = folder.parent / "other"
    other.mkdir()
    (other / MANIFEST_NAME).write_text("{}")  # of another kind, say
    with pytest.raises(BundleError, match=f"is no bundle, but holds some: give {folder}$"):
        load(folder.parent)


def test_a_run_in_the_place_of_a_bundle_is_told_how_to_become_one(bundle, tmp_path):
    (tmp_path / "run" / "stage1").mkdir(parents=True)
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(BundleError, match=r"is a run of ensembler train and no bundle; ensembler-export .*run --out"):
        bundle[1](tmp_path / "run")


def test_a_folder_in_the_place_of_a_file_is_refused(bundle):
    folder, load, file = bundle
    file.unlink()
    file.mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(bundle):
    folder, load, file = bundle
    file.chmod(0)
    with pytest.raises(BundleError, match="cannot be read"):
        load(folder)


@pytest.mark.parametrize("load", [load_client, load_server])
def test_what_is_no_folder_is_refused(load, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "missing", tmp_path / "file", tmp_path / ("x" * 300), tmp_path / "file" / "below"):
        with pytest.raises(BundleError):
            load(path)


def test_a_manifest_beyond_the_limit_is_not_read(bundle):
    folder, load, _ = bundle
    with (folder / MANIFEST_NAME).open("ab") as stream:
        stream.truncate(manifests.MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BundleError, match="larger than"):
        load(folder)
