#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""
Train the bundled model on the synthetic world, and measure it on drives it has not seen.

Trained on single scenes of the synthetic world (no obstacle in any of them), with cross-entropy
on the 19 Cityscapes train ids and with outlier exposure (Hendrycks et al., ICLR 2019): solids of
no kind stand in the scenes, flat cut-outs with mathematical patterns or recoloured pieces of other
scenes are pasted in, and logsumexp of the logits is trained by logistic loss to be positive on
known and negative on these pixels (the energy score of Liu et al., NeurIPS 2020, as a binary
classifier, as in Du et al., ICLR 2022). The test drives' obstacles (shapes, textures, renderers in
``synthetic/obstacles.py``) are never used in training, and neither are the drives' house fronts,
trees and people.

The bundled weights come from four runs, each going on from the weights of the one before:

    python models/train_demo_model.py --output first
    python models/train_demo_model.py --output second --start-from first/demo_weights.safetensors

and so on. The log has the options of each. The first started from scratch; the solids, which
matter most, came with the fourth (``--seed 5 --steps 2600 --lr 0.002 --whole-from 0.55
--class-weight-power 0.12 --outlier-weight 0.6 --prior-correction 0.5 --scenes 3200
--first-scene 200000``).

Writes weights (float16 safetensors), ``demo_model.json`` with everything an export needs, and a
log with losses, seed, versions, machine and final scores.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
import json
import math
import multiprocessing
import os
from pathlib import Path
import platform
import time
from typing import Any

from anomaly_seg_ros import __version__
from anomaly_seg_ros.classes import CITYSCAPES_CLASSES
from anomaly_seg_ros.files import atomic_write, atomic_write_text, sha256_file
from anomaly_seg_ros.networks.roadnet import parameter_count, RoadNet
from anomaly_seg_ros.synthetic import CLASSES_USED, random_scene, SyntheticDrive
from anomaly_seg_ros.synthetic.outliers import INLIER, OUTLIER, paste_outliers
import cv2
import numpy as np
import torch
from torch.nn import functional

INPUT_HW = (320, 576)
STORED_HW = (360, 640)
# What the exported model runs at: people and poles gain more by the finer pixels than the scale,
# which is within that of the augmentation, costs.
DEPLOYED_HW = (384, 672)
# Most steps see crops, which cost less; the last quarter sees whole frames.
CROP_HW = (224, 416)
# Rendered as large as a camera's frame or smaller, then scaled as the pipeline does, so that the
# aliasing of that scaling is part of training.
RENDERED_HW = ((360, 640), (540, 960), (720, 1280))
RENDERED_SHARE = (0.45, 0.3, 0.25)
# Added to the logits of classes that the world does not have, in place of their learnt bias.
UNSEEN_LOGIT = -30.0
# Share of the scenes with solids (``synthetic/solids.py``), and their label in stored scenes.
SOLIDS_SHARE = 0.6
SOLID = 254
CALIBRATION_SEED = 900
TEST_SEEDS = (2026, 7, 11, 23, 42, 5, 101, 102)
SCORES = ('max_logit', 'msp', 'entropy', 'energy')


def make_scene(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return one training scene: image uint8 (360, 640, 3) and labels uint8 (360, 640)."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng([seed, 4])
    size = RENDERED_HW[rng.choice(3, p=RENDERED_SHARE)]
    solids = int(rng.integers(1, 5)) if rng.random() < SOLIDS_SHARE else 0
    frame = random_scene(seed, size, solids)
    if frame.labels is None or frame.anomaly_mask is None:
        raise ValueError('a scene without labels')
    image, labels = frame.image_rgb, frame.labels.copy()
    labels[frame.anomaly_mask == 255] = 255
    labels[frame.anomaly_mask == 1] = SOLID
    if size != STORED_HW:
        wh = (STORED_HW[1], STORED_HW[0])
        image = cv2.resize(image, wh, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, wh, interpolation=cv2.INTER_NEAREST_EXACT)
    return image, labels


def make_scenes(first: int, count: int, workers: int, cache: Path | None
                ) -> tuple[np.ndarray, np.ndarray]:
    """Render ``count`` scenes, or read ``cache``; the result does not depend on ``workers``."""
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            return stored['images'], stored['labels']
    images = np.empty((count, *STORED_HW, 3), np.uint8)
    labels = np.empty((count, *STORED_HW), np.uint8)
    context = multiprocessing.get_context('spawn')
    started = time.perf_counter()
    with context.Pool(workers) as pool:
        seeds = range(first, first + count)
        for k, (image, label) in enumerate(pool.imap(make_scene, seeds, chunksize=25)):
            images[k], labels[k] = image, label
            if (k + 1) % 500 == 0:
                print(f'{k + 1} of {count} scenes, {time.perf_counter() - started:.0f} s',
                      flush=True)
    if cache is not None:
        with atomic_write(cache) as temporary, open(temporary, 'wb') as stream:
            np.savez(stream, images=images, labels=labels)
    return images, labels


class Augmenter:
    """Draws training samples from stored scenes; all randomness comes from one seed."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, seed: int) -> None:
        self._images, self._labels = images, labels
        self._rng = np.random.default_rng([seed, 5])
        # Scenes in which a class can be seen well, for classes that few pixels have.
        counts = np.stack([np.bincount(scene[::4, ::4].ravel(), minlength=256)[:19]
                           for scene in labels])
        rarity = counts.sum(0) / counts.sum()
        self._scenes_of = {c: np.flatnonzero(counts[:, c] >= 6) for c in CLASSES_USED
                           if 0 < rarity[c] < 0.03 and (counts[:, c] >= 6).any()}

    def batch(self, size: int, output_hw: tuple[int, int]
              ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return normalised images (N, 3, H, W), labels (N, H/2, W/2), outlier marks alike."""
        samples = [self._sample(output_hw) for _ in range(size)]
        x = torch.from_numpy(np.stack([s[0] for s in samples])).float().div_(255)
        x = x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (RoadNet.mean, RoadNet.std))
        y = torch.from_numpy(np.stack([s[1] for s in samples])).long()
        marks = torch.from_numpy(np.stack([s[2] for s in samples])).long()
        return (x - mean) / std, y, marks

    def _sample(self, output_hw: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = self._rng
        h, w = STORED_HW
        if rng.random() < 0.5:
            rare = int(rng.choice(list(self._scenes_of)))
            k = int(rng.choice(self._scenes_of[rare]))
            rows, cols = np.nonzero(self._labels[k][::4, ::4] == rare)
            pick = int(rng.integers(len(rows)))
            centre = 4 * int(rows[pick]), 4 * int(cols[pick])
        else:
            k = int(rng.integers(len(self._images)))
            centre = int(rng.integers(h)), int(rng.integers(w))
        image, labels = self._images[k], self._labels[k]
        # The pipeline shows the network all of a frame at INPUT_HW; a zoom of 1 is that scale.
        zoom = rng.uniform(0.8, 1.5) if rng.random() < 0.6 else 1.0
        ch = min(round(output_hw[0] * h / INPUT_HW[0] / zoom), h)
        cw = min(round(ch * output_hw[1] / output_hw[0]), w)
        y = min(max(centre[0] - int(rng.uniform(0.25, 0.75) * ch), 0), h - ch)
        x = min(max(centre[1] - int(rng.uniform(0.25, 0.75) * cw), 0), w - cw)
        image, labels = image[y:y + ch, x:x + cw], labels[y:y + ch, x:x + cw]
        wh = (output_hw[1], output_hw[0])
        image = cv2.resize(image, wh, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels, wh, interpolation=cv2.INTER_NEAREST_EXACT)
        if rng.random() < 0.5:
            image, labels = image[:, ::-1].copy(), labels[:, ::-1].copy()
        other = self._images[int(rng.integers(len(self._images)))]
        solid = labels == SOLID
        labels[solid] = 255
        count = int(rng.integers(1, 5)) if rng.random() < 0.8 else 0
        marks = paste_outliers(rng, image, labels, other, count)
        marks[solid & (marks == INLIER)] = OUTLIER
        gain = rng.uniform(0.75, 1.3) * rng.uniform(0.93, 1.07, 3)
        table = np.arange(256)[:, None] / 255
        table = np.clip(table ** math.exp(rng.uniform(-0.25, 0.25)) * gain, 0, 1) * 255
        image = cv2.LUT(image, table.astype(np.uint8)[None])
        if rng.random() < 0.2:
            image = cv2.GaussianBlur(image, (3, 3), rng.uniform(0.3, 1.0))
        return image, labels[1::2, 1::2], marks[1::2, 1::2]


def class_weights(labels: np.ndarray, power: float) -> torch.Tensor:
    """Return weights (19,) that grow with rarity to some power, 1 for the commonest."""
    counts = np.bincount(labels[::4].ravel(), minlength=256)[:len(CITYSCAPES_CLASSES)]
    share = counts / counts.sum()
    weights = np.where(share > 0, (share.max() / np.maximum(share, 1e-4)) ** power, 1.0)
    return torch.tensor(weights, dtype=torch.float32)


def losses(logits: torch.Tensor, labels: torch.Tensor, marks: torch.Tensor,
           weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the segmentation loss and the outlier loss of logits (N, 19, H, W)."""
    inlier, outlier = (labels != 255) & (marks == 0), marks == OUTLIER
    energy = torch.logsumexp(logits, 1)
    # Cross-entropy is energy less the logit of the true class.
    target = labels.masked_fill(~inlier, 0)
    weight = weights[target] * inlier
    truth = logits.gather(1, target[:, None])[:, 0]
    segmentation = ((energy - truth) * weight).sum() / weight.sum()
    pull = functional.softplus(-energy)[inlier]
    # Half of the inlier term is the worst 2 % of the pixels: false alarms are rare but loud.
    hard = torch.topk(pull, max(1, pull.numel() // 50)).values.mean()
    loss = 0.5 * pull.mean() + 0.5 * hard * 0.5
    if outlier.any():
        loss = loss + functional.softplus(energy)[outlier].mean()
    return segmentation, loss


def train(options: argparse.Namespace, log: dict[str, Any]) -> RoadNet:
    """Train a network and return it with weights rounded to float16."""
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    images, labels = make_scenes(options.first_scene, options.scenes, options.workers,
                                 options.cache)
    weights = class_weights(labels, options.class_weight_power)
    network = RoadNet(len(CITYSCAPES_CLASSES)).train().to(memory_format=torch.channels_last)
    if options.start_from is not None:
        from safetensors.torch import load_file
        network.load_state_dict({key: value.float() if value.is_floating_point() else value
                                 for key, value in load_file(options.start_from).items()})
    log['parameters'] = parameter_count(network)
    print(f"{log['parameters']} parameters", flush=True)
    decay = [p for p in network.parameters() if p.ndim > 1]
    rest = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{'params': decay, 'weight_decay': 1e-3},
                                   {'params': rest, 'weight_decay': 0.0}], lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.steps,
                                                   pct_start=0.05)
    average = torch.optim.swa_utils.AveragedModel(
        network, avg_fn=lambda old, new, done: old + (new - old) * max(0.005, 1 / (done + 1)),
        use_buffers=True)
    source = Augmenter(images, labels, options.seed)
    started = time.perf_counter()
    # One thread prepares the next batch while this one is learnt from.
    loader = ThreadPoolExecutor(1)
    upcoming = loader.submit(source.batch, options.batch, CROP_HW)
    for step in range(1, options.steps + 1):
        x, y, marks = upcoming.result()
        whole = step + 1 > options.whole_from * options.steps
        upcoming = loader.submit(source.batch, options.batch, INPUT_HW if whole else CROP_HW)
        with torch.autocast('cpu', torch.bfloat16):
            logits = network(x)
        segmentation, outlier = losses(logits.float(), y, marks, weights)
        loss = segmentation + options.outlier_weight * outlier
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(network)
        if step % options.log_every == 0 or step == 1:
            row = {'step': step, 'segmentation_loss': round(segmentation.item(), 4),
                   'outlier_loss': round(outlier.item(), 4),
                   'learning_rate': float(f'{schedule.get_last_lr()[0]:.4g}'),
                   'seconds': round(time.perf_counter() - started, 1)}
            log['losses'].append(row)
            print(row, flush=True)
        if time.perf_counter() - started > 60 * options.minutes:
            print(f'stopped after {step} steps: {options.minutes} minutes are over', flush=True)
            break
    upcoming.result()
    loader.shutdown()
    log['steps_done'] = step
    # Rare classes weigh more in training, so the network names them too often.
    shift = options.prior_correction * class_weights(labels, 0.3).log()
    return finished(average.module, shift)


def finished(network: RoadNet, shift: torch.Tensor) -> RoadNet:
    """
    Return the network as it is saved, in values that float16 holds.

    ``shift`` (19,) is subtracted from the logits, and classes never seen are never named.
    """
    result = RoadNet(len(CITYSCAPES_CLASSES)).eval()
    result.load_state_dict(network.state_dict())
    with torch.no_grad():
        # One bias for each class and each of the four sub-pixels.
        bias = result.head.bias.view(len(CITYSCAPES_CLASSES), -1)
        bias -= shift[:, None]
        for index in set(range(len(CITYSCAPES_CLASSES))) - set(CLASSES_USED):
            bias[index] = UNSEEN_LOGIT
        for value in result.state_dict().values():
            if value.is_floating_point():
                value.copy_(value.half())
    return result


def score_maps(logits: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the four scores of logits (1, 19, h, w), each float32 (h, w)."""
    f = logits[0].double()
    lse = torch.logsumexp(f, 0)
    p = torch.softmax(f, 0)
    maps = {'max_logit': -f.max(0).values, 'msp': 1 - p.max(0).values,
            'entropy': lse - (p * f).sum(0), 'energy': -lse}
    return {name: value.float().numpy() for name, value in maps.items()}


def run_drive(network: RoadNet, drive: SyntheticDrive, stride: int
              ) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray]:
    """Return the confusion matrix (19, 19), scores and targets of all pixels that are not void."""
    count = len(CITYSCAPES_CLASSES)
    confusion = np.zeros(count * count, np.int64)
    scores: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    targets = []
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (RoadNet.mean, RoadNet.std))
    for index in range(0, len(drive), stride):
        frame = drive[index]
        h, w = frame.labels.shape
        small = cv2.resize(frame.image_rgb, DEPLOYED_HW[::-1],
                           interpolation=cv2.INTER_LINEAR_EXACT)
        x = torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255
        with torch.inference_mode():
            logits = network((x - mean) / std)
        labels = logits[0].argmax(0).numpy().astype(np.uint8)
        labels = cv2.resize(labels, (w, h), interpolation=cv2.INTER_NEAREST_EXACT)
        known = frame.labels != 255
        confusion += np.bincount(frame.labels[known].astype(np.int64) * count + labels[known],
                                 minlength=count * count)
        valid = frame.anomaly_mask != 255
        targets.append(frame.anomaly_mask[valid])
        for name, value in score_maps(logits).items():
            full = cv2.resize(value, (w, h), interpolation=cv2.INTER_LINEAR)
            scores[name].append(full[valid])
    return (confusion.reshape(count, count), {k: np.concatenate(v) for k, v in scores.items()},
            np.concatenate(targets))


def iou_by_class(confusion: np.ndarray) -> dict[str, float]:
    """Return the IoU of every class that occurs in the ground truth."""
    hit = np.diag(confusion)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return {CITYSCAPES_CLASSES[k]: round(float(hit[k] / union[k]), 4)
            for k in np.flatnonzero(confusion.sum(1))}


def ranking(score: np.ndarray, target: np.ndarray) -> tuple[float, float, float, float]:
    """Return average precision, FPR at 95 % recall, best F1 and its threshold."""
    order = np.argsort(-score, kind='stable')
    target, score = target[order], score[order]
    last = np.flatnonzero(np.append(np.diff(score) != 0, True))  # ends of groups of ties
    hits = np.cumsum(target, dtype=np.int64)[last]
    alarms = last + 1 - hits
    positives, negatives = hits[-1], alarms[-1]
    recall, precision = hits / positives, hits / (hits + alarms)
    ap = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    fpr95 = float(alarms[np.argmax(recall >= 0.95)] / negatives)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax())
    return ap, fpr95, float(f1[best]), float(score[last[best]])


def measure(network: RoadNet, seeds: tuple[int, ...], frames: int, stride: int
            ) -> list[dict[str, Any]]:
    """Return segmentation and anomaly figures of one drive for each seed."""
    rows = []
    for seed in seeds:
        confusion, scores, target = run_drive(network, SyntheticDrive(seed, frames), stride)
        classes = iou_by_class(confusion)
        row: dict[str, Any] = {
            'drive_seed': seed, 'miou': round(float(np.mean(list(classes.values()))), 4),
            'accuracy': round(float(np.diag(confusion).sum() / confusion.sum()), 4),
            'positive_share': round(float(target.mean()), 5), 'iou_by_class': classes}
        for name in SCORES:
            ap, fpr95, f1, threshold = ranking(scores[name], target)
            row[name] = {'average_precision': round(ap, 4), 'fpr95': round(fpr95, 4),
                         'best_f1': round(f1, 4), 'best_f1_threshold': round(threshold, 4),
                         'percentiles_1_99': [round(float(v), 4) for v in
                                              np.percentile(scores[name][::7], (1, 99))]}
        rows.append(row)
        print(f"drive {seed}: mIoU {row['miou']:.4f}, AP {row['max_logit']['average_precision']}, "
              f"FPR95 {row['max_logit']['fpr95']}", flush=True)
    return rows


def save_weights(network: RoadNet, path: Path) -> None:
    """Write the state dict as float16 safetensors."""
    from safetensors.torch import save_file

    state = {key: value.half().contiguous() if value.is_floating_point() else value
             for key, value in network.state_dict().items()}
    with atomic_write(path) as temporary:
        save_file(state, temporary)


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--seed', type=int, default=1, help='seed of weights and sampling')
    parser.add_argument('--steps', type=int, default=8000, help='optimiser steps')
    parser.add_argument('--batch', type=int, default=8, help='images per step')
    parser.add_argument('--lr', type=float, default=4e-3, help='highest learning rate')
    parser.add_argument('--outlier-weight', type=float, default=0.35,
                        help='weight of the outlier loss')
    parser.add_argument('--class-weight-power', type=float, default=0.3,
                        help='how much more rare classes weigh; 0: not at all')
    parser.add_argument('--prior-correction', type=float, default=0.0,
                        help='how much of the logarithm of the class weights (power 0.3) to take '
                        'off the logits in the end')
    parser.add_argument('--start-from', type=Path, help='weights of an earlier run to go on from')
    parser.add_argument('--whole-from', type=float, default=0.85,
                        help='share of the steps that see crops, before whole frames')
    parser.add_argument('--scenes', type=int, default=4000, help='training scenes to render')
    parser.add_argument('--first-scene', type=int, default=100000, help='seed of the first scene')
    parser.add_argument('--cache', type=Path, help='.npz to keep the rendered scenes in, and to '
                        'take them from; delete it when the world has changed')
    parser.add_argument('--workers', type=int, default=2, help='rendering processes')
    parser.add_argument('--threads', type=int, default=2, help='torch threads')
    parser.add_argument('--minutes', type=float, default=60, help='stop training after this long')
    parser.add_argument('--log-every', type=int, default=50, help='steps between log rows')
    parser.add_argument('--test-frames', type=int, default=60, help='frames of a test drive')
    parser.add_argument('--test-stride', type=int, default=4, help='measure every n-th frame')
    parser.add_argument('--output', type=Path, default=Path(__file__).resolve().parent,
                        help='folder for weights, demo_model.json and the log')
    options = parser.parse_args()
    started = time.perf_counter()
    log: dict[str, Any] = {
        'seed': options.seed,
        'options': {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
                    if k not in ('output', 'cache')},
        'machine': {'cores': os.cpu_count(), 'architecture': platform.machine()},
        'versions': {'anomaly_seg_ros': __version__, 'python': platform.python_version(),
                     'torch': torch.__version__, 'numpy': np.__version__,
                     'opencv': cv2.__version__},
        'losses': []}
    network = train(options, log)
    log['train_minutes'] = round((time.perf_counter() - started) / 60, 1)
    weights = options.output / 'demo_weights.safetensors'
    save_weights(network, weights)
    calibration = measure(network, (CALIBRATION_SEED,), options.test_frames, options.test_stride)
    log['calibration_drive'] = calibration[0]
    log['test_drives'] = measure(network, TEST_SEEDS, options.test_frames, options.test_stride)
    log['minimum'] = {
        'miou': min(row['miou'] for row in log['test_drives']),
        **{name: min(row[name]['average_precision'] for row in log['test_drives'])
           for name in SCORES}}
    log['total_minutes'] = round((time.perf_counter() - started) / 60, 1)
    score = 'max_logit'
    model = {
        'network': 'roadnet', 'weights': weights.name, 'weights_sha256': sha256_file(weights),
        'input_size_hw': DEPLOYED_HW, 'output_stride': RoadNet.output_stride,
        'channel_order': RoadNet.channel_order, 'mean': RoadNet.mean, 'std': RoadNet.std,
        'classes_used': [CITYSCAPES_CLASSES[k] for k in CLASSES_USED], 'score': score,
        'seed': options.seed}
    atomic_write_text(options.output / 'demo_model.json', json.dumps(model, indent=1) + '\n')
    atomic_write_text(options.output / 'demo_training_log.json', json.dumps(log, indent=1) + '\n')
    print(json.dumps(log['minimum']))


if __name__ == '__main__':
    main()
