"""Content credentials: signed files hold for c2pa's own reader, and everything that is wrong is seen and said."""

import datetime
import hashlib
import io
import json
import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_flux_krea.commands.shared import settings
from mlx_flux_krea.commands.shared.output import meant_file
from mlx_flux_krea.commands.shared.reviewing import ReviewTarget, carry_out
from mlx_flux_krea.credentials import certificate, reading, signing
from mlx_flux_krea.errors import CredentialsError, UsageError
from mlx_flux_krea.filters.ledger import Ledger, Verdict, pixel_hash
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.provenance import SOFTWARE, Picture, read_picture, read_record

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
RECORD = {"software": SOFTWARE, "model": "krea", "license": "dev", "prompt": "a secret frog", "seed": 2**64 - 1}
RECORD |= {"base": "FLUX.1", "notes": 'кот "猫" ]]> \x00\x9f', "image_seed": None, "sigmas": [0.5, 1e-9]}
NAMES = ("a.png", "a.jpg", "a.webp")
QUICK = ["--width", "48", "--height", "32", "--steps", "1", "--seed", "1"]
NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
pytestmark = pytest.mark.skipif(find_spec("c2pa") is None, reason="needs c2pa-python, the extra `credentials`")
# c2pa's own reader with the settings that it comes with, in a process that knows nothing of ours
READER = """
import json, sys, c2pa
for path in sys.argv[1:]:
    with c2pa.Reader(path) as reader:
        store = json.loads(reader.json())
        print(json.dumps([reader.get_validation_state(), store["manifests"][store["active_manifest"]],
              [one["code"] for one in store["validation_results"]["activeManifest"]["failure"]]]))
"""


def read_elsewhere(*paths) -> list[list]:
    """Validation state, active manifest and failures of each file."""
    ran = subprocess.run([sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return list(map(json.loads, ran.stdout.splitlines()))


def picture(**more) -> Picture:
    return Picture.from_pixels(PIXELS, RECORD | more)


def data_of(manifest: dict, label: str) -> dict:
    return next(one["data"] for one in manifest["assertions"] if one["label"] == label)


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture
def folder(home):
    """The folder of this installation's certificate."""
    certificate.find_identity()
    return home / "credentials"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- signed files ---


@pytest.mark.parametrize("name", NAMES)
def test_signing_changes_neither_pixels_nor_the_rest_of_the_record(name):
    picture().save(name, credentials="require")
    picture().save(f"plain-{name}")
    assert np.array_equal(pixels_of(name), pixels_of(f"plain-{name}"))
    signed, plain = (read_picture(path) for path in (name, f"plain-{name}"))
    assert signed.pop("record") == plain.pop("record") | {"credentials": True}
    assert signed == plain
    assert os.path.getsize(name) - os.path.getsize(f"plain-{name}") < 6000  # no thumbnail is in it
    assert reading.has_credentials(Path(name))
    assert not reading.has_credentials(Path(f"plain-{name}"))


def test_files_hold_for_c2pas_own_reader_in_a_fresh_process():
    for name in NAMES:
        picture().save(name, credentials="on")
    picture().save("minimal.png", credentials="on", metadata="minimal")
    *read, minimal = read_elsewhere(*NAMES, "minimal.png")
    for state, manifest, failures in read:
        assert (state, failures) == ("Valid", ["signingCredential.untrusted"])
        assert manifest["signature_info"]["common_name"] == "flux-krea local"
        (made,) = data_of(manifest, "c2pa.actions.v2")["actions"]
        assert made["action"] == "c2pa.created"
        assert made["digitalSourceType"] == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
        assert f"{made['softwareAgent']['name']} {made['softwareAgent']['version']}" == SOFTWARE
        assert json.loads(data_of(manifest, signing.RECORD)["record"]) == RECORD
    assert data_of(minimal[1], signing.RECORD) == {
        name: RECORD[name] for name in ("software", "model", "license", "base")
    }
    assert b"secret frog" in Path("a.png").read_bytes()
    assert b"secret" not in Path("minimal.png").read_bytes()


def test_an_edit_has_its_input_as_parent_whose_own_credentials_are_kept():
    key, chain = Path("other.key"), Path("other.pem")
    for path, data in zip((chain, key), certificate.make_certificate(), strict=True):
        path.write_bytes(data)
    key.chmod(0o600)
    picture().save("in.webp", credentials=signing.Signing("require", chain, key))
    Image.fromarray(PIXELS).save("style.png")
    sources = [signing.parent(Path("in.webp")), signing.Ingredient("style image", "inputTo", Path("style.png"))]
    edited = picture(image={"width": 64})
    edited.save("out.jpg", credentials=signing.Signing("require", sources=sources))
    ((state, manifest, _),) = read_elsewhere("out.jpg")
    opened, made = data_of(manifest, "c2pa.actions.v2")["actions"]
    assert (state, opened["action"], made["action"]) == ("Valid", "c2pa.opened", "c2pa.edited")
    assert made["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    parent, style = sorted(manifest["ingredients"], key=lambda one: one["title"])
    assert (parent["relationship"], style["relationship"]) == ("parentOf", "inputTo")
    assert parent["active_manifest"]
    assert not style.get("active_manifest")
    found = reading.read_credentials(Path("out.jpg"))
    assert found["state"] == "trusted"
    shown = dict(reading.in_words(found))
    assert shown["made from"].startswith("input image; signed by flux-krea local; created (trainedAlgorithmicMedia)")
    assert shown["made with"] == "style image; without credentials"
    assert "in.webp" not in json.dumps(manifest)  # no name of a file


@pytest.mark.parametrize("gone", ["missing", "no image", "changed"])
def test_an_input_without_a_usable_file_is_named(gone):
    path = Path("in.png")
    if gone == "no image":
        path.write_text("none")
    if gone == "changed":
        picture().save(path, credentials="require")
        path.write_bytes(path.read_bytes()[:-200])
    sources = () if gone == "missing" else [signing.parent(path)]
    picture(image={}).save("out.png", credentials=signing.Signing("require", sources=sources))
    found = reading.read_credentials(Path("out.png"))
    assert (found["state"], len(found["ingredients"])) == ("trusted", 1)
    assert found["actions"][0] == "opened"


def test_a_tampered_input_is_shown_as_that():
    picture().save("in.png", credentials="require")
    data = bytearray(Path("in.png").read_bytes())
    data[-100] ^= 1
    Path("in.png").write_bytes(data)
    picture(image={}).save("out.png", credentials=signing.Signing("require", sources=[signing.parent(Path("in.png"))]))
    found = reading.read_credentials(Path("out.png"))
    assert found["state"] == "trusted"
    assert found["ingredients"][0]["problems"] == ["the file was changed after it was signed"]


@pytest.mark.slow
def test_in_python_an_input_keeps_its_credentials_while_its_file_is_the_same(pipe):
    picture().save("in.png", credentials="require")
    size = {"width": 64, "height": 48, "num_inference_steps": 1, "seed": 1, "strength": 1.0}
    for image in ("in.png", Image.open("in.png")):
        made = pipe("cat", image=image, **size).images[0]
        made.copy().save("out.png", credentials="require")
        (found,) = reading.read_credentials(Path("out.png"))["ingredients"]
        assert (found["relation"], found["signer"]) == ("parentOf", "flux-krea local")
    picture().save("in.png")
    made.save("out.png", credentials="require")
    (found,) = reading.read_credentials(Path("out.png"))["ingredients"]
    assert (found["relation"], "signer" in found) == ("parentOf", False)


# --- reading ---


@pytest.mark.core("a.png")
@pytest.mark.parametrize("name", NAMES)
def test_one_changed_byte_is_seen_wherever_it_is(name):
    """Also those of the credentials, except for their padding, which says nothing."""
    picture().save(name, credentials="require")
    whole, path = Path(name).read_bytes(), Path(f"changed-{name}")
    good, states, words = reading.read_credentials(Path(name)), [], set()
    for place in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = reading.read_credentials(path)
        assert found is None or found["state"] in ("invalid", "damaged") or found == good, place
        states.append(found and found["state"])
        words |= {text for _, text in reading.in_words(found)}
    assert states.count("invalid") >= 20
    assert states.count("trusted") <= 12
    assert "the file was changed after it was signed" in words


def test_inspect_says_who_signed_and_whether_that_is_known(command):
    picture().save("own.png", credentials="require")
    picture().save("none.png")
    for path, data in zip(("c.pem", "k.pem"), certificate.make_certificate(), strict=True):
        Path(path).write_bytes(data)
    os.chmod("k.pem", 0o600)
    picture().save("others.png", credentials=signing.Signing("require", Path("c.pem"), Path("k.pem")))
    own, others, none = (command("inspect", name)[1] for name in ("own.png", "others.png", "none.png"))
    assert "the signer is known here" in own
    assert "flux-krea local (this installation's own certificate, or yours)" in own
    assert "krea, licence dev" in own
    assert "flux-krea local (unknown: in no list here)" in others
    assert "none; a program that saves a picture again may have removed them" in none
    assert command("config", "certificate", "c.pem")[0] == command("config", "certificate-key", "k.pem")[0] == 0
    assert "the signer is known here" in command("inspect", "others.png")[1]
    assert json.loads(command("inspect", "own.png", "--json")[1])["credentials"]["state"] == "trusted"


def test_a_re_save_by_pillow_loses_them_and_inspect_says_so(command):
    picture().save("a.jpg", credentials="require")
    with Image.open("a.jpg") as image:
        image.save("plain.jpg")
        image.save("kept.jpg", xmp=image.info["xmp"])
    assert read_elsewhere("a.jpg")
    assert "none; a program that saves a picture again" in command("inspect", "plain.jpg")[1]
    assert "lost: it was signed when it was made here" in command("inspect", "kept.jpg")[1]
    assert json.loads(command("inspect", "plain.jpg", "--json")[1])["credentials"] is None
    assert json.loads(command("inspect", "kept.jpg", "--json")[1])["credentials"] == {"state": "lost"}


@pytest.mark.parametrize(
    "data", [b"", b"\x89PNG", b"\xff\xd8\xff\xeb", b"RIFF\xff\xff\xff\xffWEBPC2P", b"\x89PNG" + b"\0" * 900]
)
def test_broken_files_have_no_credentials(data):
    Path("a.png").write_bytes(data)
    assert not reading.has_credentials(Path("a.png"))
    assert reading.read_credentials(Path("a.png")) is None


def test_pictures_of_other_formats_are_checked_too(command):
    import c2pa

    identity = certificate.find_identity()
    info, plain, out = c2pa.C2paSignerInfo(b"es256", identity.chain, identity.key, None), io.BytesIO(), io.BytesIO()
    Image.fromarray(PIXELS).save(plain, "TIFF")
    manifest = signing.make_manifest(RECORD, metadata="full")
    with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
        builder.sign(signer, "image/tiff", plain, out)
    Path("scan.tiff").write_bytes(out.getvalue())
    assert "good: nothing was changed" in command("inspect", "scan.tiff")[1]
    Image.fromarray(PIXELS).save("scan.gif")
    assert "credentials  none" in command("inspect", "scan.gif")[1]
    Path("photo.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    code, _, err = command("inspect", "photo.heic")
    assert (code, "it is HEIC or AVIF" in err or "cannot be opened" in err) == (2, True)


def mutants(value, odd):
    """Copies of a JSON value, each with another part of it replaced."""
    yield odd
    if isinstance(value, dict):
        for name, part in value.items():
            yield from (value | {name: one} for one in mutants(part, odd))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from ([*value[:place], one, *value[place + 1 :]] for one in mutants(part, odd))


@pytest.mark.parametrize("odd", [None, 3, "\x1b[2J" * 999, ["a"], {"a": [1]}, [[{}]]], ids=repr)
def test_statements_of_any_type_break_nothing(odd):
    """Anybody writes them: the parts of real credentials, each replaced in turn."""
    import c2pa

    picture().save("in.png", credentials="require")
    picture(image={}).save("a.png", credentials=signing.Signing("require", sources=[signing.parent(Path("in.png"))]))
    with c2pa.Reader("a.png") as reader:
        store = json.loads(reader.json())
    tried = 0
    for one in mutants(store, odd):
        found = reading._facts(one if isinstance(one, dict) else {}, set())
        assert all(len(text) < 1500 for _, text in reading.in_words(found))
        tried += 1
    assert tried > 100


# --- the certificate ---


def test_the_certificate_is_made_once_for_its_owner_alone_and_names_no_person(folder):
    from cryptography import x509

    first = (folder / "certificate.pem").read_bytes()
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert certificate.find_identity().chain == first
    leaf, root = x509.load_pem_x509_certificates(first)
    assert leaf.subject.rfc4514_string() == "O=flux-krea local,CN=flux-krea local"
    assert root.subject.rfc4514_string() == "O=flux-krea local,CN=flux-krea local root"
    assert leaf.not_valid_after_utc > NOW + 365 * 29 * DAY
    assert b"PRIVATE" not in first
    assert "PRIVATE" not in repr(certificate.find_identity())
    (folder / "certificate.pem").unlink()  # as where a process died between the two files
    assert certificate.find_identity().chain != first


@pytest.mark.slow
def test_processes_that_start_together_make_one_certificate(home):
    script = "from mlx_flux_krea.credentials.certificate import find_identity; print(find_identity().chain)"
    ran = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) for _ in range(4)]
    assert len({process.communicate()[0] for process in ran}) == 1
    assert sorted(path.name for path in (home / "credentials").iterdir()) == ["certificate.pem", "key.pem", "lock"]


def wrong(folder: Path, how: str) -> str:
    """Spoils the certificate or the key. Returns words of the error."""
    chain, key = folder / "certificate.pem", folder / "key.pem"
    made = certificate.make_certificate
    if how in ("wrong clock", "expired"):
        start = NOW + 2 * DAY if how == "wrong clock" else NOW - 9 * DAY
        new = made(start, start + 3 * DAY)
        chain.write_bytes(new[0])
        key.write_bytes(new[1])
        return "set the clock" if how == "wrong clock" else "expected a certificate that is valid now"
    if how == "foreign key":
        key.write_bytes(made()[1])
        return "is not the key of"
    if how == "foreign chain":
        leaf, end = chain.read_bytes().partition(b"-----END CERTIFICATE-----\n")[:2]
        chain.write_bytes(leaf + end + made()[0])
        return "was not issued by the one after it"
    if how == "readable key":
        key.chmod(0o644)
        return f"others can read {key} (its mode is 644); expected a key for its owner alone; type: chmod 600 {key}"
    path = key if "key" in how else chain
    path.write_bytes(b"-----BEGIN NOTHING-----")
    return f"{path} cannot be read"


WRONG = ("wrong clock", "expired", "foreign key", "foreign chain", "readable key", "broken key", "broken certificate")


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_sign_leaves_a_picture_unsigned_or_holds_it_back(folder, caplog, how):
    words = wrong(folder, how)
    with pytest.raises(CredentialsError) as error:
        picture().save("held.png", credentials="require")
    assert words in str(error.value)
    assert error.value.exit_code == 6
    assert not list(Path().glob("*held*"))
    picture().save("a.png", credentials="on")
    assert "the picture is saved without credentials" in caplog.text
    assert words in caplog.text
    assert not reading.has_credentials(Path("a.png"))
    assert "credentials" not in read_record(Path("a.png"))


def test_a_certificate_for_another_purpose_is_refused_by_c2pa_itself(folder, monkeypatch):
    from cryptography import x509

    purpose = x509.oid.ExtendedKeyUsageOID
    monkeypatch.setattr(purpose, "EMAIL_PROTECTION", purpose.SERVER_AUTH)
    for path, data in zip(("certificate.pem", "key.pem"), certificate.make_certificate(), strict=True):
        (folder / path).write_bytes(data)
    with pytest.raises(CredentialsError, match="cannot be signed: Signature: the certificate is invalid"):
        picture().save("a.png", credentials="require")


@pytest.mark.slow
def test_a_full_disk_leaves_no_half_of_a_certificate_or_of_a_picture(home):
    """The system's limit on the size of a file stands for it."""
    script = """
import resource, sys, numpy as np
from mlx_flux_krea.provenance import Picture
picture = Picture.from_pixels(np.zeros((8, 8, 3), np.uint8), {"software": "x"})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
try:
    picture.save("a.png", credentials=sys.argv[2])
except Exception as error:
    print(type(error).__name__, error)
"""

    def run(room: int, mode: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", script, str(room), mode], capture_output=True, text=True, check=True
        )
        return ran.stdout + ran.stderr

    assert "CredentialsError" in run(500, "require")  # room for the key, not for the certificate
    assert [path.name for path in (home / "credentials").iterdir()] in (["key.pem", "lock"], ["lock", "key.pem"])
    assert not list(Path().iterdir())
    certificate.find_identity()
    assert "a.png cannot be written: File too large" in run(
        3000, "require"
    )  # room for the picture, not for a signed one
    assert not list(Path().iterdir())
    assert run(9000, "require") == ""
    assert reading.read_credentials(Path("a.png"))["state"] == "trusted"


def own_chain(kind: str, *more) -> tuple[Path, Path]:
    """Files of a chain and its key, issued by a root of others; with more extensions."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    made = {
        "ed25519": lambda: ed25519.Ed25519PrivateKey.generate(),
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
    }[kind]()
    issuer = ec.generate_private_key(ec.SECP256R1())
    name, root = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, one)]) for one in ("A Studio", "A Root"))
    may = dict.fromkeys(("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False)
    may |= dict.fromkeys(("crl_sign", "encipher_only", "decipher_only"), False)
    above = x509.CertificateBuilder(root, root, issuer.public_key(), 6, NOW - DAY, NOW + DAY)
    above = above.add_extension(x509.BasicConstraints(True, None), True)
    above = above.add_extension(x509.KeyUsage(digital_signature=False, key_cert_sign=True, **may), True)
    above = above.add_extension(x509.SubjectKeyIdentifier.from_public_key(issuer.public_key()), False)
    builder = x509.CertificateBuilder(root, name, made.public_key(), 7, NOW - DAY, NOW + DAY)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True)
    builder = builder.add_extension(x509.KeyUsage(digital_signature=True, key_cert_sign=False, **may), True)
    builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), False)
    builder = builder.add_extension(x509.ExtendedKeyUsage([x509.oid.ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
    for extension in more:
        builder = builder.add_extension(extension, False)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    chain = [one.sign(issuer, hashes.SHA256()).public_bytes(pem) for one in (builder, above)]
    Path("c.pem").write_bytes(b"".join(chain))
    Path("k.pem").write_bytes(made.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    Path("locked.pem").write_bytes(made.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"x")))
    for path in ("k.pem", "locked.pem"):
        os.chmod(path, 0o600)
    return Path("c.pem"), Path("k.pem")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ed25519", "p384", "rsa"])
def test_ones_own_chain_signs_with_other_algorithms(kind):
    chain, key = own_chain(kind)
    picture().save("a.png", credentials=signing.Signing("require", chain, key))
    assert reading.read_credentials(Path("a.png"))["signer"] == "A Studio"
    assert read_elsewhere("a.png")[0][0] == "Valid"
    with pytest.raises(CredentialsError, match=r"locked\.pem needs a password"):
        picture().save("b.png", credentials=signing.Signing("require", chain, Path("locked.pem")))


# --- the command ---


@pytest.mark.slow
def test_the_command_signs_what_it_saves_and_its_contact_sheet(command, model):
    code, out, err = command(
        "generate", "cat", "-m", model, *QUICK[:-2], "-n", "2", "--contact-sheet", "--credentials", "require"
    )
    assert (code, out.split()) == (0, ["out.png", "out-2.png", "out-sheet.png"]), err
    (one, _, sheet) = read_elsewhere(*out.split())
    assert one[0] == sheet[0] == "Valid"
    assert json.loads(data_of(one[1], signing.RECORD)["record"])["prompt"] == "cat"
    parts = sheet[1]["ingredients"]
    assert [part["relationship"] for part in parts] == ["componentOf"] * 2
    assert all(part["active_manifest"] for part in parts)
    again = ["generate", "cat", "-m", model, *QUICK, "--image", "out.png", "--strength", "1", "-o", "edit.jpg"]
    assert command("config", "credentials", "on")[0] == 0
    assert command(*again)[0] == 0
    (edit,) = read_elsewhere("edit.jpg")
    assert [(one["relationship"], bool(one["active_manifest"])) for one in edit[1]["ingredients"]] == [
        ("parentOf", True)
    ]
    assert command(*again, "-o", "off.jpg", "--credentials", "off")[0] == 0
    assert not reading.has_credentials(Path("off.jpg"))


def test_a_picture_that_waited_is_signed_when_it_is_released(command, model, home):
    picture().save("in.png", credentials="require")
    given = ("--check", "review", "--credentials", "require", "--metadata", "minimal", "--image", "in.png")
    assert command("generate", "cat", "-m", model, *QUICK, *given, "--strength", "1")[0] == 5
    ledger = Ledger()
    (waiting,) = ledger.waiting()
    path, how = meant_file(ledger.meant_for(waiting))
    assert how == {"metadata": "minimal", "credentials": "require"}
    verdict = Verdict(
        "approved", waiting.facts["pixels"], reviewer="Ann", answers={"unlawful": False, "infringing": False}
    )
    (home / "credentials" / "key.pem").chmod(0o604)
    with ledger.claimed(waiting), pytest.raises(CredentialsError):
        carry_out(verdict, waiting, ledger, ReviewTarget(path, how))
    (home / "credentials" / "key.pem").chmod(0o600)
    assert not Path("out.png").exists()
    (waiting,) = ledger.waiting()
    with ledger.claimed(waiting):
        assert carry_out(verdict, waiting, ledger, ReviewTarget(path, how)) == Path("out.png")
    ((state, manifest, _),) = read_elsewhere("out.png")
    assert (state, manifest["ingredients"][0]["relationship"]) == ("Valid", "parentOf")
    assert manifest["ingredients"][0]["active_manifest"]
    last = Log(home / "log").read()[-1]
    assert (last["event"], last["pixels"]) == ("written", pixel_hash(pixels_of("out.png")))
    assert last["unsigned_sha256"] != last["file_sha256"] == hashlib.sha256(Path("out.png").read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_run_whose_picture_cannot_be_signed_is_kept_and_goes_on(command, model, folder, monkeypatch):
    given = ("generate", "cat", "-m", model, *QUICK, "--credentials", "require")
    (folder / "key.pem").chmod(0o640)
    code, out, err = command(*given)  # seen before anything is computed
    assert (code, out) == (6, "")
    assert "others can read" in err
    assert "seed" not in err
    monkeypatch.setattr("mlx_flux_krea.commands.shared.generation.check_credentials", lambda mode: None)
    code, out, err = command(*given)  # as where it is changed meanwhile
    assert (code, out) == (6, "")
    assert "type: chmod 600" in err
    assert "continue with: flux-krea resume" in err
    assert not list(Path().iterdir())
    (folder / "key.pem").chmod(0o600)
    code, out, err = command("resume")
    assert (code, Path(out.strip()).name) == (0, "out.png"), err
    assert reading.read_credentials(Path("out.png"))["state"] == "trusted"


@pytest.mark.slow
def test_with_on_the_run_goes_on_with_a_note(command, model, folder):
    (folder / "key.pem").chmod(0o640)
    code, out, err = command("generate", "cat", "-m", model, *QUICK, "--credentials", "on")
    assert (code, out) == (0, "out.png\n")
    assert "note: the picture is saved without credentials: others can read" in err


def test_without_the_extra_the_option_says_what_to_install_and_all_else_works(command, model, monkeypatch):
    picture().save("signed.png", credentials="require")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    assert command("generate", "cat", "-m", model, *QUICK)[0] == 0
    for mode in ("on", "require"):
        code, out, err = command("generate", "cat", "-m", model, *QUICK, "--credentials", mode)
        assert (code, out) == (2, "")
        assert "--credentials needs the package c2pa-python, which is not installed; install it: pip install" in err
    assert command("review", "--credentials", "on")[0] == 2
    assert (
        "there are some; to read them: pip install 'mlx-flux-krea[credentials]'" in command("inspect", "signed.png")[1]
    )
    assert json.loads(command("inspect", "out.png", "--json")[1])["credentials"] is None
    with pytest.raises(UsageError, match="c2pa-python"):
        picture().save("a.png", credentials="on")


def test_one_of_certificate_and_key_alone_is_refused(command, model):
    Path("c.pem").write_bytes(b"")
    assert command("config", "certificate", "c.pem")[0] == 0
    assert json.loads(command("config", "--json")[1]) == {"certificate": str(Path("c.pem").absolute())}
    code, _, err = command("generate", "cat", "-m", model, *QUICK, "--credentials", "require")
    assert (code, "flux-krea config certificate-key FILE" in err) == (2, True)
    assert settings.read_options() == {}
    with pytest.raises(UsageError, match="`credentials` is 'yes'; expected one of off, on, require"):
        picture().save("a.png", credentials="yes")


# --- no network ---


@pytest.mark.slow
def test_an_address_in_a_file_is_not_opened(folder):
    """Neither that of credentials elsewhere, nor that of revoked certificates. A reader that may opens both."""
    import socket

    import c2pa
    from cryptography import x509

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.c2pa"
        identity, out = certificate.find_identity(), io.BytesIO()
        info = c2pa.C2paSignerInfo(b"es256", identity.chain, identity.key, None)
        manifest = signing.make_manifest(RECORD, metadata="full")
        plain = io.BytesIO()
        Image.fromarray(PIXELS).save(plain, "PNG")
        with (
            c2pa.Context.from_dict(signing.SETTINGS) as context,
            c2pa.Signer.from_info(info) as signer,
            c2pa.Builder(manifest, context) as builder,
        ):
            builder.set_no_embed()
            builder.set_remote_url(address)
            builder.sign(signer, "image/png", plain, out)
        Path("remote.png").write_bytes(out.getvalue())
        found = reading.read_credentials(Path("remote.png"))
        assert found == {"state": "elsewhere", "problems": [address]}
        picture(image={}).save(
            "b.png", credentials=signing.Signing("require", sources=[signing.parent(Path("remote.png"))])
        )
        asked = x509.AccessDescription(x509.AuthorityInformationAccessOID.OCSP, x509.UniformResourceIdentifier(address))
        chain, key = own_chain("p384", x509.AuthorityInformationAccess([asked]))
        picture().save("c.png", credentials=signing.Signing("require", chain, key))
        assert reading.read_credentials(Path("c.png"), chain)["state"] == "trusted"
        with pytest.raises(TimeoutError):
            server.accept()
        server.settimeout(20)
        anchors = chain.read_text()
        ocsp = f"c2pa.Context.from_dict({{'verify': {{'ocsp_fetch': True}}, 'trust': {{'user_anchors': {anchors!r}}}}})"
        for name, context in (("remote.png", "None"), ("c.png", ocsp)):
            script = f"import c2pa; c2pa.Reader('{name}', context={context})"
            process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
            server.accept()[0].close()
            process.wait()


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="the filter is of Linux on x86-64"
)
def test_signing_and_reading_work_where_a_socket_ends_the_process(home):
    """The kernel kills the process at the system call `socket` (41), whoever makes it, Python or the library."""
    script = """
import ctypes, socket, struct, sys, numpy as np
from pathlib import Path
from mlx_flux_krea.credentials import reading
from mlx_flux_krea.provenance import Picture
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("code", ctypes.c_void_p)]
code = b"".join(struct.pack("HBBI", *row) for row in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 41), (0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)))
buffer = ctypes.create_string_buffer(code)
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, ctypes.cast(buffer, ctypes.c_void_p).value)), 0, 0) == 0
for name in ("a.png", "a.jpg", "a.webp"):
    picture = Picture.from_pixels(np.zeros((32, 32, 3), np.uint8), {"software": "x", "image": {}})
    picture.save(name, credentials="require")
    assert reading.read_credentials(Path(name))["state"] == "trusted"
print("signed and read", flush=True)
socket.socket()
print("a socket", flush=True)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if "AssertionError" in ran.stderr and "prctl" in ran.stderr:
        pytest.skip("the kernel takes no filter here")
    assert (ran.returncode, ran.stdout) == (-31, "signed and read\n"), ran.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(home):
    """benchmarks/credentials.py shows it for a thousand."""
    ran = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "benchmarks" / "credentials.py", "60"],
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["files"] == 60
    assert report["grown_bytes"] < 4e6, report
