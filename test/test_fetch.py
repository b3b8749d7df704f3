# SPDX-License-Identifier: Apache-2.0
"""Downloads from a real server on this machine: whole, truncated, tampered, absent."""

from collections.abc import Iterator
from dataclasses import dataclass, field
import hashlib
import http.server
import json
from pathlib import Path
import threading

from anomaly_seg_ros.cli import cli
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.fetch import fetch, read_catalogue
from click.testing import CliRunner
import pytest

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = bytes(range(256)) * 9000  # two blocks and a bit
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass
class Server:
    """What the server answers, path by path, and what it was asked."""

    url: str = ''
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    redirects: dict[str, str] = field(default_factory=dict)
    cut_at: dict[str, int] = field(default_factory=dict)
    without_length: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.files.get(self.path)
            if self.path in state.redirects:
                self.send_response(302)
                self.send_header('Location', state.url + state.redirects[self.path])
                content = b'It is elsewhere.'
            elif content is None:
                self.send_response(404)
                content = b'not here'
            else:
                self.send_response(200)
            for key, value in state.headers.get(self.path, {}).items():
                self.send_header(key, value)
            if self.path not in state.without_length:
                self.send_header('Content-Length', str(len(content)))
            self.end_headers()
            self.wfile.write(content[:state.cut_at.get(self.path)])

        def log_message(self, *arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        state.url = f'http://127.0.0.1:{httpd.server_port}'
        yield state
        httpd.shutdown()
        thread.join()


def catalogue(tmp_path: Path, server: Server, **changes: object) -> Path:
    """Write a catalogue with one file of the server."""
    entry = {'network': 'erfnet', 'url': f'{server.url}/weights.pth', 'source': 'http://page',
             'licence': 'none', 'input_size_hw': [512, 1024], 'classes': 'cityscapes',
             'sha256': {'weights.pth': DIGEST}, **changes}
    path = tmp_path / 'catalogue.yaml'
    path.write_text(json.dumps({'models': {'small': {
        k: v for k, v in entry.items() if v is not None}}}))
    return path


def test_a_file_is_downloaded_verified_and_kept(tmp_path: Path, server: Server) -> None:
    server.files['/weights.pth'] = WEIGHTS
    listing, folder, seen = catalogue(tmp_path, server), tmp_path / 'a' / 'models', []
    entry = fetch('small', folder, listing, progress=lambda *values: seen.append(values))
    assert (folder / 'weights.pth').read_bytes() == WEIGHTS
    assert seen[-1] == ('weights.pth', len(WEIGHTS), len(WEIGHTS))
    assert len(seen) == 3
    assert sorted(p.name for p in folder.iterdir()) == ['fetched.json', 'weights.pth']
    assert json.loads((folder / 'fetched.json').read_text())['weights.pth'] == {
        'url': f'{server.url}/weights.pth', 'sha256': DIGEST, 'verified_by': 'the catalogue'}
    assert entry.export_command(folder) == (
        f'anomaly-seg export erfnet --weights {folder}/weights.pth --score max_logit '
        '--input-size 512x1024 --output small.onnx')
    fetch('small', folder, listing)
    assert server.asked == ['/weights.pth'], 'a verified file was downloaded again'
    (folder / 'weights.pth').write_bytes(b'changed since')
    with pytest.raises(UserError, match=r'weights\.pth: there already, and has changed since it '
                                        r'was fetched\. Nothing was overwritten\..*--output'):
        fetch('small', folder, listing)
    assert (folder / 'weights.pth').read_bytes() == b'changed since'
    (folder / 'weights.pth').unlink()
    fetch('small', folder, listing)
    assert (folder / 'weights.pth').read_bytes() == WEIGHTS
    (folder / 'fetched.json').unlink()
    fetch('small', folder, listing)
    assert len(server.asked) == 2, 'a file that the catalogue knows was downloaded again'


@pytest.mark.parametrize('digest_known', [True, False])
@pytest.mark.parametrize('cut_at', [0, 1000, 1_500_000])
def test_a_truncated_file_is_not_kept(tmp_path: Path, server: Server, digest_known: bool,
                                      cut_at: int) -> None:
    server.files['/weights.pth'] = WEIGHTS
    server.cut_at['/weights.pth'] = cut_at
    listing = catalogue(tmp_path, server, **({} if digest_known else {'sha256': None}))
    with pytest.raises(UserError, match=rf'weights\.pth: .*{cut_at} .*again'):
        fetch('small', tmp_path / 'models', listing)
    assert list((tmp_path / 'models').iterdir()) == []


def test_a_tampered_file_is_not_kept(tmp_path: Path, server: Server) -> None:
    tampered = bytearray(WEIGHTS)
    tampered[12345] ^= 1
    server.files['/weights.pth'] = bytes(tampered)
    folder = tmp_path / 'models'
    with pytest.raises(UserError, match=rf'not the file expected: its SHA-256 is '
                                        rf'{hashlib.sha256(tampered).hexdigest()}, by the '
                                        rf'catalogue it should be {DIGEST}.*not kept'):
        fetch('small', folder, catalogue(tmp_path, server))
    assert list(folder.iterdir()) == []


def test_the_length_of_a_redirect_is_not_the_files(tmp_path: Path, server: Server) -> None:
    """Its own text has a length; the file behind it may come without one."""
    server.redirects['/weights.pth'] = '/raw/weights.pth'
    server.files['/raw/weights.pth'] = WEIGHTS
    server.without_length.add('/raw/weights.pth')
    seen: list[tuple[str, int, int | None]] = []
    fetch('small', tmp_path / 'models', catalogue(tmp_path, server, sha256=None),
          progress=lambda *values: seen.append(values))
    assert (tmp_path / 'models' / 'weights.pth').read_bytes() == WEIGHTS
    assert seen[-1] == ('weights.pth', len(WEIGHTS), None)
    record = json.loads((tmp_path / 'models' / 'fetched.json').read_text())
    assert record['weights.pth']['verified_by'] == 'nothing'


def test_an_etag_is_not_taken_for_a_digest(tmp_path: Path, server: Server) -> None:
    """As GitHub answers: a redirect, then an ETag of 64 digits that is no digest of the file."""
    server.redirects['/weights.pth'] = '/raw/weights.pth'
    server.files['/raw/weights.pth'] = WEIGHTS
    server.headers['/raw/weights.pth'] = {'ETag': f'W/"{"8fd4" * 16}"'}
    folder, listing = tmp_path / 'models', catalogue(tmp_path, server, sha256=None)
    for _ in range(2):
        fetch('small', folder, listing)
    assert server.asked == ['/weights.pth', '/raw/weights.pth']
    assert json.loads((folder / 'fetched.json').read_text())['weights.pth'] == {
        'url': f'{server.url}/weights.pth', 'sha256': DIGEST, 'verified_by': 'its length only'}


def test_no_network(tmp_path: Path) -> None:
    nobody = Server(url='http://127.0.0.1:9')
    folder = tmp_path / 'models'
    with pytest.raises(UserError, match=rf'cannot be reached.*Without network.*get weights\.pth '
                                        rf'from http://page on another machine, copy to {folder}, '
                                        r'and run: anomaly-seg export erfnet'):
        fetch('small', folder, catalogue(tmp_path, nobody))
    assert not folder.exists()


def test_a_file_that_the_server_does_not_have(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r'the server answers 404 Not Found.*another machine'):
        fetch('small', tmp_path / 'models', catalogue(tmp_path, server))
    with pytest.raises(UserError, match=r"unknown model 'large'; choose one of small"):
        fetch('large', tmp_path / 'models', catalogue(tmp_path, server))


@pytest.fixture
def hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Serve a checkpoint as Hugging Face does: a redirect whose headers state the digest."""
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    base = '/owner/net/resolve/main'
    server.files[f'{base}/config.json'] = b'{}'
    server.files[f'{base}/preprocessor_config.json'] = b'{"size": 1}'
    server.redirects[f'{base}/pytorch_model.bin'] = '/storage/1'
    server.headers[f'{base}/pytorch_model.bin'] = {'X-Linked-Etag': f'"{DIGEST}"'}
    server.files['/storage/1'] = WEIGHTS
    return catalogue(tmp_path, server, url=None, sha256=None, huggingface='owner/net',
                     network='segformer')


def test_hugging_face(tmp_path: Path, server: Server, hub: Path) -> None:
    folder = tmp_path / 'models'
    entry = fetch('small', folder, hub)
    assert (folder / 'pytorch_model.bin').read_bytes() == WEIGHTS
    record = json.loads((folder / 'fetched.json').read_text())
    assert record['pytorch_model.bin']['sha256'] == DIGEST
    assert record['pytorch_model.bin']['verified_by'] == 'the server'
    assert record['config.json']['verified_by'] == 'its length only'
    assert f'--weights {folder} ' in entry.export_command(folder)
    asked = len(server.asked)
    fetch('small', folder, hub)
    assert len(server.asked) == asked, 'verified files were downloaded again'


def test_hugging_face_file_that_is_not_what_it_states(tmp_path: Path, server: Server,
                                                      hub: Path) -> None:
    server.files['/storage/1'] = WEIGHTS[:-1] + b'!'
    with pytest.raises(UserError, match=rf'by the server it should be {DIGEST}'):
        fetch('small', tmp_path / 'models', hub)
    assert sorted(p.name for p in (tmp_path / 'models').iterdir()) == [
        'config.json', 'fetched.json', 'preprocessor_config.json']


def test_command(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files go to a folder of the checkpoint's name; the next command is printed."""
    monkeypatch.setenv('HF_ENDPOINT', server.url)
    monkeypatch.chdir(tmp_path)
    for name in ('config.json', 'preprocessor_config.json', 'model.safetensors'):
        server.files['/nvidia/segformer-b0-finetuned-cityscapes-1024-1024/resolve/main/'
                     f'{name}'] = name.encode()
    result = CliRunner().invoke(cli, ['fetch', 'segformer_b0_cityscapes'])
    assert result.exit_code == 0, result.output
    assert [p.name for p in tmp_path.iterdir()] == ['segformer_b0_cityscapes']
    assert (tmp_path / 'segformer_b0_cityscapes' / 'config.json').read_bytes() == b'config.json'
    assert result.output.endswith(
        '\nanomaly-seg export segformer --weights segformer_b0_cityscapes --score max_logit '
        '--input-size 512x1024 --output segformer_b0_cityscapes.onnx\n')


def test_files_of_others_are_not_overwritten(tmp_path: Path, server: Server, hub: Path) -> None:
    """Neither the user's own, nor those of another model that was fetched into the folder."""
    own, folder = tmp_path / 'own', tmp_path / 'models'
    own.mkdir()
    (own / 'pytorch_model.bin').write_bytes(b'trained for a week')
    with pytest.raises(UserError, match=r'pytorch_model\.bin: there already, and is not known to '
                                        r'be a file of this model.*small into a folder of its'):
        fetch('small', own, hub)
    assert [p.name for p in own.iterdir()] == ['pytorch_model.bin']
    assert server.asked == []
    fetch('small', folder, hub)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = catalogue(tmp_path, server, url=None, sha256=None, huggingface='owner/other',
                      network='segformer')
    with pytest.raises(UserError, match=r'config\.json: there already, and was fetched from '
                                        r'http.*/owner/net/resolve/main/config\.json\. Nothing'):
        fetch('small', folder, other)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_better_format_is_taken_where_there_is_one(tmp_path: Path, server: Server,
                                                       hub: Path) -> None:
    server.files['/owner/net/resolve/main/model.safetensors'] = b'safe'
    fetch('small', tmp_path / 'models', hub)
    assert (tmp_path / 'models' / 'model.safetensors').read_bytes() == b'safe'
    assert not (tmp_path / 'models' / 'pytorch_model.bin').exists()


@pytest.mark.parametrize('changes, message', [
    ({'sha256': {'weights.pth': 'abc'}}, '64 hexadecimal'),
    ({'licence': None}, 'licence'), ({'colour': 'red'}, 'unknown entries'),
    ({'huggingface': 'a/b'}, 'either huggingface or url')])
def test_bad_catalogues(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = catalogue(tmp_path, Server(url='http://x'), **changes)
    with pytest.raises(UserError, match=rf'catalogue\.yaml: not a model catalogue.*{message}'):
        read_catalogue(path)
    path.write_text('models: [')
    with pytest.raises(UserError, match='not a model catalogue'):
        read_catalogue(path)
    with pytest.raises(UserError, match='cannot be read'):
        read_catalogue(tmp_path / 'none.yaml')


def test_the_shipped_catalogue() -> None:
    from anomaly_seg_ros.networks import NETWORKS

    entries = read_catalogue(ROOT / 'models' / 'catalogue.yaml')
    readme = (ROOT / 'models' / 'README.md').read_text()
    for name, entry in entries.items():
        assert entry.network in NETWORKS, name
        assert entry.miou is None or (0.4 < entry.miou < 0.9 and entry.miou_source), name
        assert f'| `{name}` |' in readme, f'{name} is missing in models/README.md'
    b0 = entries['segformer_b0_cityscapes']
    assert f'\n{b0.export_command(Path(b0.name))}\n' in readme
    for networks, count in (('segformer', 6), ('mask2former', 4), ('eomt', 1), ('erfnet', 1)):
        assert sum(entry.network == networks for entry in entries.values()) == count
