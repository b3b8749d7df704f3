# SPDX-License-Identifier: Apache-2.0
"""
Download a checkpoint of ``models/catalogue.yaml`` and verify it.

A file counts only once its whole content has arrived (its length is what the server announced) and
its SHA-256 is the one expected: the catalogue's, or, where that has none, the one that the server
states. Hugging Face does, for every large file; of other files the length alone is verified. What
was had, and how it was verified, is kept in ``fetched.json`` beside the files.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from email.message import Message
import hashlib
from http.client import HTTPException
import json
import os
from pathlib import Path
import re
import shlex
from typing import Any
from urllib import error, request

from anomaly_seg_ros import __version__
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.files import atomic_write, atomic_write_text, sha256_file
from anomaly_seg_ros.resources import resource
import yaml

Progress = Callable[[str, int, int | None], None]

_SHA256 = re.compile(r'[0-9a-f]{64}')
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class CatalogueFile:
    """
    One file of a checkpoint.

    Attributes
    ----------
    names
        Its name; more than one where the source may hold any of them, best first.
    urls
        Where to have it, one for each name.
    sha256
        Expected digest, hexadecimal; None where it is not known.

    """

    names: tuple[str, ...]
    urls: tuple[str, ...]
    sha256: str | None


@dataclass(frozen=True)
class CatalogueEntry:
    """
    One checkpoint that people use.

    Attributes
    ----------
    name
        Its name here.
    network
        Name in ``anomaly_seg_ros.networks.NETWORKS``.
    source
        Web page of the checkpoint.
    licence
        Licence of the weights, as their source states it.
    input_size_hw
        Height and width of the suggested export.
    classes
        Class set: cityscapes, ade20k, ...
    miou
        Published mean IoU as a fraction, None where none was found; ``miou_source`` says on what.
    miou_source
        Data set and publication of ``miou``.
    files
        What to download.

    """

    name: str
    network: str
    source: str
    licence: str
    input_size_hw: tuple[int, int]
    classes: str
    miou: float | None
    miou_source: str
    files: tuple[CatalogueFile, ...]

    def weights(self, folder: Path) -> Path:
        """Return what ``--weights`` takes once the files are in ``folder``."""
        return folder / self.files[0].names[0] if len(self.files) == 1 else folder

    def export_command(self, folder: Path, score: str | None = None) -> str:
        """Return the command line that exports the checkpoint in ``folder``."""
        height, width = self.input_size_hw
        score = score or ('rba' if self.network in ('mask2former', 'eomt') else 'max_logit')
        return shlex.join([
            'anomaly-seg', 'export', self.network, '--weights', str(self.weights(folder)),
            '--score', score, '--input-size', f'{height}x{width}',
            '--output', f'{self.name}.onnx'])


def read_catalogue(path: Path | str | None = None) -> dict[str, CatalogueEntry]:
    """
    Read a catalogue; None takes the one that is installed.

    Raises
    ------
    UserError
        If the file cannot be read or an entry is not complete; names both.

    """
    path = Path(path) if path is not None else resource('models/catalogue.yaml')
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
        return {name: _entry(name, values) for name, values in content['models'].items()}
    except OSError as cause:
        raise UserError(f'{path}: cannot be read ({cause.strerror}).') from cause
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError) as cause:
        raise UserError(f'{path}: not a model catalogue ({cause!r}). See models/README.md for its '
                        'form.') from cause


def fetch(name: str, folder: Path | str, catalogue: Path | str | None = None,
          progress: Progress | None = None) -> CatalogueEntry:
    """
    Download the checkpoint called ``name`` into ``folder`` and verify it.

    Files that an earlier call has put there, and that have not changed, are not downloaded again.
    Other files are never overwritten.

    Parameters
    ----------
    name
        Name in the catalogue.
    folder
        Where to put the files; made if it is missing.
    catalogue
        Another catalogue than the installed one.
    progress
        Called with file name, bytes so far and bytes in all (None where the server does not say).

    Raises
    ------
    UserError
        If there is no such model (lists the choices), another file is in the place of one of its
        files, the network or the server fails, or a file is not what it should be. A file that
        failed leaves nothing behind; those before it stay.

    """
    entries = read_catalogue(catalogue)
    if name not in entries:
        raise UserError(f'unknown model {name!r}; choose one of {", ".join(sorted(entries))}')
    entry, folder = entries[name], Path(folder)
    record_path = folder / 'fetched.json'
    record = _read_record(record_path)
    # All are looked at before the first is downloaded: a folder of two models is of no use.
    for file in [file for file in entry.files if not _is_there(file, folder, record, name)]:
        got_name, facts = _download(file, folder, entry, progress)
        record[got_name] = facts
        atomic_write_text(record_path, json.dumps(record, indent=1, sort_keys=True) + '\n')
    return entry


def _is_there(file: CatalogueFile, folder: Path, record: dict[str, Any], model: str) -> bool:
    """Tell whether ``folder`` holds the file; raises UserError if another is in its place."""
    path = next((folder / name for name in file.names if (folder / name).exists()), None)
    if path is None:
        return False
    facts = record.get(path.name, {})
    source, digest = facts.get('url'), sha256_file(path) if path.is_file() else None
    if digest is not None and (digest == file.sha256 or (
            file.sha256 is None and source in file.urls and digest == facts.get('sha256'))):
        return True
    why = ('is not known to be a file of this model' if source is None else
           f'was fetched from {source}' if source not in file.urls else
           'has changed since it was fetched' if digest != facts.get('sha256') else
           'is not the file of which the catalogue has the digest')
    raise UserError(f'{path}: there already, and {why}. Nothing was overwritten. Fetch {model} '
                    'into a folder of its own (--output), or move this file away.')


def _download(file: CatalogueFile, folder: Path, entry: CatalogueEntry,
              progress: Progress | None) -> tuple[str, dict[str, Any]]:
    """Download the first of the file's names that the server has."""
    for name, url in zip(file.names, file.urls, strict=True):
        redirects = _Redirects()
        ask = request.Request(url, headers={'User-Agent': f'anomaly_seg_ros/{__version__}'})
        try:
            response = request.build_opener(redirects).open(ask, timeout=_TIMEOUT_S)
        except error.HTTPError as cause:
            if cause.code == 404 and name != file.names[-1]:
                continue
            raise UserError(f'{url}: the server answers {cause.code} {cause.reason}. '
                            + _by_hand(entry, folder)) from cause
        except (error.URLError, OSError, HTTPException, ValueError) as cause:
            raise UserError(f'{url}: cannot be reached ({getattr(cause, "reason", cause)}). '
                            + _by_hand(entry, folder)) from cause
        with response, atomic_write(folder / name) as temporary:
            # Of a redirect's headers only the digest is the file's; its length is its own.
            length = response.headers.get('Content-Length')
            digest = _receive(response, length, temporary, name, url, progress)
            expected, verified = file.sha256, 'the catalogue'
            if expected is None:
                expected = _stated_sha256(*redirects.headers, response.headers)
                verified = 'the server'
            if expected is not None and digest != expected:
                raise UserError(
                    f'{url}: not the file expected: its SHA-256 is {digest}, by {verified} it '
                    f'should be {expected}. It was not kept. The source may have changed: look at '
                    f'{entry.source}, and do not use a file that you cannot explain.')
        return name, {'url': url, 'sha256': digest,
                      'verified_by': verified if expected else
                      'its length only' if length else 'nothing'}
    raise AssertionError('a catalogue file has at least one name')


def _receive(response: Any, announced: str | None, path: Path, name: str, url: str,
             progress: Progress | None) -> str:
    """Write the response to ``path`` and return its digest; its length must be as announced."""
    total = int(announced) if announced is not None and announced.isdigit() else None
    digest, received = hashlib.sha256(), 0
    with open(path, 'wb') as stream:
        while True:
            try:
                block = response.read(1 << 20)
            except (OSError, HTTPException) as cause:
                raise UserError(f'{url}: the connection broke after {received} bytes ({cause}). '
                                'Run the same command again.') from cause
            if not block:
                break
            stream.write(block)
            digest.update(block)
            received += len(block)
            if progress is not None:
                progress(name, received, total)
    if received == 0 or (total is not None and received != total):
        raise UserError(f'{url}: the file ends after {received} of '
                        f'{"its" if total is None else total} bytes. It was not kept; run the '
                        'same command again.')
    return digest.hexdigest()


class _Redirects(request.HTTPRedirectHandler):
    """Follow redirects and keep their headers: Hugging Face states the digest in the first."""

    def __init__(self) -> None:
        self.headers: list[Message] = []

    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any,
                         newurl: str) -> request.Request | None:
        """Note the headers, then do as usual."""
        self.headers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _stated_sha256(*sources: Message) -> str | None:
    # Not the plain ETag: GitHub's has 64 digits too, and is no digest of the content.
    for headers in sources:
        value = headers.get('X-Linked-Etag', '').removeprefix('W/').strip('"').lower()
        if _SHA256.fullmatch(value):
            return value
    return None


def _by_hand(entry: CatalogueEntry, folder: Path) -> str:
    files = ', '.join(' or '.join(file.names) for file in entry.files)
    return (f'Without network here: get {files} from {entry.source} on another machine, copy to '
            f'{folder}, and run: {entry.export_command(folder)}')


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return {}  # nothing known of the files beside it
    if not isinstance(record, dict):
        return {}
    return {name: facts for name, facts in record.items() if isinstance(facts, dict)}


def _entry(name: str, values: dict[str, Any]) -> CatalogueEntry:
    known = {'network', 'huggingface', 'revision', 'url', 'sha256', 'source', 'licence',
             'input_size_hw', 'classes', 'miou', 'miou_source'}
    if unknown := sorted(values.keys() - known):
        raise ValueError(f'{name} has unknown entries {unknown}')
    if ('huggingface' in values) == ('url' in values):
        raise ValueError(f'{name} needs either huggingface or url')
    height, width = values['input_size_hw']
    source = values.get('source') or f'https://huggingface.co/{values["huggingface"]}'
    digests = values.get('sha256') or {}
    if any(not _SHA256.fullmatch(str(digest)) for digest in digests.values()):
        raise ValueError(f'{name}: sha256 must be 64 hexadecimal digits')
    if 'url' in values:
        url = values['url']
        file_name = url.rpartition('/')[2]
        files: Sequence[CatalogueFile] = [
            CatalogueFile((file_name,), (url,), digests.get(file_name))]
    else:
        base = (f'{os.environ.get("HF_ENDPOINT", "https://huggingface.co")}/'
                f'{values["huggingface"]}/resolve/{values.get("revision", "main")}')
        files = [CatalogueFile(names, tuple(f'{base}/{n}' for n in names),
                               next((digests[n] for n in names if n in digests), None))
                 for names in (('config.json',), ('preprocessor_config.json',),
                               ('model.safetensors', 'pytorch_model.bin'))]
    miou = values.get('miou')
    return CatalogueEntry(
        name, values['network'], source, values['licence'], (int(height), int(width)),
        values['classes'], None if miou is None else float(miou), values.get('miou_source', ''),
        tuple(files))
