# SPDX-License-Identifier: Apache-2.0
"""Data set adapters on small trees of every layout that people download."""

from pathlib import Path
import shutil
from typing import Any

from anomaly_seg_ros.datasets import DATASETS, ImageFolder, open_dataset, PairedDataset
from anomaly_seg_ros.datasets.lost_and_found import FISHYSCAPES_FRAMES
from anomaly_seg_ros.datasets.reading import file_size_hw, read_image, read_mask
from anomaly_seg_ros.datasets.source import natural_key
from anomaly_seg_ros.errors import UserError
import cv2
import numpy as np
import pytest
import yaml

SIZE_HW = (6, 8)


def save(path: Path, pixels: np.ndarray) -> None:
    """Write RGB or grey pixels; the ending decides the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixels.ndim == 3:
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    good, data = cv2.imencode(path.suffix, pixels)
    assert good
    path.write_bytes(data.tobytes())


def picture(value: int) -> np.ndarray:
    """Return an even RGB image that even JPEG keeps nearly."""
    return np.full((*SIZE_HW, 3), (value, 60, 200), np.uint8)


def codes(*values: int) -> np.ndarray:
    """Return a mask whose first pixels are ``values``, the rest the first of them."""
    mask = np.full(SIZE_HW, values[0], np.uint8)
    mask.reshape(-1)[:len(values)] = values
    return mask


def write_pair(root: Path, image: str, mask: str | None, *values: int, red: int = 100) -> None:
    """Write one image and its mask below ``root``."""
    save(root / image, picture(red))
    if mask is not None:
        save(root / mask, codes(*values))


def first_pixels(array: np.ndarray | None, count: int) -> list[int] | None:
    """Return the first pixels of a mask."""
    return None if array is None else array.reshape(-1)[:count].tolist()


def expect(dataset: PairedDataset, frame_ids: list[str], anomaly: list[int] | None,
           labels: list[int] | None, count: int) -> None:
    """Compare the frames' names and the first pixels of the first frame's truth."""
    assert dataset.frame_ids == frame_ids and len(dataset) == len(frame_ids)
    frame = dataset[0]
    assert frame.frame_id == frame_ids[0]
    assert frame.image_rgb.shape == (*SIZE_HW, 3) and frame.image_rgb.dtype == np.uint8
    assert abs(int(frame.image_rgb[0, 0, 2]) - 200) < 12
    assert first_pixels(frame.anomaly_mask, count) == anomaly
    assert first_pixels(frame.labels, count) == labels
    assert [f.frame_id for f in dataset] == frame_ids
    assert dataset.check() == [] and dataset.problems == ()


@pytest.mark.parametrize('ending', ['png', 'jpg', 'webp'])
@pytest.mark.parametrize('name', ['road_anomaly_21', 'road_obstacle_21', 'fs_lost_and_found',
                                  'fs_static'])
def test_simple_layout(tmp_path: Path, name: str, ending: str) -> None:
    for number in (10, 2, 0, 1):
        write_pair(tmp_path, f'images/{number}.{ending}', f'labels_masks/{number}.png', 0, 1, 255,
                   red=number)
    dataset = open_dataset(name, tmp_path)
    expect(dataset, ['0', '1', '2', '10'], [0, 1, 255, 0], None, 4)
    assert dataset.name == name and dataset.root == tmp_path
    assert [abs(int(frame.image_rgb[0, 0, 0]) - red) < 12 for frame, red in
            zip(dataset, (0, 1, 2, 10), strict=True)] == [True] * 4


def test_masks_with_upper_case_endings_are_masks(tmp_path: Path) -> None:
    """Names as in the test split, where they would else be images without ground truth."""
    for track, frame in ('anomaly', 'cow1'), ('obstacle', 'motorway_1'):
        root = tmp_path / track
        write_pair(root, f'images/{frame}.JPG', f'labels_masks/{frame}.PNG', 0, 1, 255)
        for split in (None, 'test', 'all'):
            dataset = open_dataset(f'road_{track}_21', root, split=split)
            expect(dataset, [frame], [0, 1, 255], None, 3)
        save(root / 'labels_masks/else.png', codes(0))
        with pytest.raises(UserError, match=r'else\.png: no image'):
            open_dataset(f'road_{track}_21', root)
    frame = 'aachen_000000_000019'
    write_pair(tmp_path / 'flat', f'{frame}_leftImg8bit.PNG', f'{frame}_gtFine_labelIds.PNG', 7)
    assert open_dataset('cityscapes', tmp_path / 'flat')[0].labels is not None


def test_road_anomaly_21_official(tmp_path: Path) -> None:
    root = tmp_path / 'dataset_AnomalyTrack'
    for index in (0, 1):
        write_pair(root, f'images/validation000{index}.jpg',
                   f'labels_masks/validation000{index}_labels_semantic.png', 255, 0, 1)
        save(root / f'labels_masks/validation000{index}_labels_semantic_color.png', picture(3))
    write_pair(root, 'images/zebra0000.jpg', None)
    for given in (root, tmp_path):
        expect(open_dataset('road_anomaly_21', given), ['validation0000', 'validation0001'],
               [255, 0, 1], None, 3)
    test = open_dataset('road_anomaly_21', root, split='test')
    assert test.frame_ids == ['zebra0000'] and test[0].anomaly_mask is None
    everything = open_dataset('road_anomaly_21', root, split='all')
    assert [frame.anomaly_mask is None for frame in everything] == [False, False, True]


def test_road_obstacle_21_official(tmp_path: Path) -> None:
    for frame in ('validation_1', 'validation_19', 'validation_25', 'validation_2',
                  'validation_30'):
        write_pair(tmp_path, f'images/{frame}.webp', f'labels_masks/{frame}_labels_semantic.png',
                   255, 0, 1)
    for frame in ('curvy-street_can_1', 'darkasphalt2_dog_1', 'driveway_box_2', 'snowstorm1_a_1'):
        write_pair(tmp_path, f'images/{frame}.webp', None)
    expect(open_dataset('road_obstacle_21', tmp_path, keep_going=True),
           ['validation_1', 'validation_2', 'validation_30'], [255, 0, 1], None, 3)
    for split, frames in (('test', ['curvy-street_can_1', 'darkasphalt2_dog_1']),
                          ('night', ['driveway_box_2']), ('snowstorm', ['snowstorm1_a_1'])):
        assert open_dataset('road_obstacle_21', tmp_path, split=split).frame_ids == frames
    assert len(open_dataset('road_obstacle_21', tmp_path, split='all')) == 9


LAF_FRAMES = ('04_Maurener_Weg_8_000000_000030', '01_Hanns_Klemm_Str_45_000000_000080')


@pytest.mark.parametrize(('image', 'mask'), [
    ('leftImg8bit/{split}/{scene}/{frame}_leftImg8bit.png',
     'fishyscapes_lostandfound/{index:04d}_{frame}_labels.png'),
    ('lostandfound/leftImg8bit/{split}/{scene}/{frame}_leftImg8bit.png',
     'fishyscapes_lostandfound/{index:04d}_{frame}_labels.png'),
    ('laf_images/{frame}_leftImg8bit.png',
     'fishyscapes_lostandfound/{index:04d}_{frame}_labels.png'),
    ('leftImg8bit/{split}/{scene}/{frame}_leftImg8bit.webp',
     'labels/val/{frame}_fishy-labels.png'),
    ('original/{frame}.png', 'labels/{frame}.png'),
])
def test_fs_lost_and_found_official(tmp_path: Path, image: str, mask: str) -> None:
    for index, (frame, split) in enumerate(zip(LAF_FRAMES, ('test', 'train'), strict=True)):
        names = {'frame': frame, 'index': index, 'split': split, 'scene': frame[:-14]}
        write_pair(tmp_path, image.format(**names), mask.format(**names), 0, 1, 255)
    if 'original' not in image:
        # Lost & Found has many more frames than Fishyscapes chose.
        write_pair(tmp_path, image.format(frame='02_Hanns_000001_000010', split='test',
                                          scene='02_Hanns'), None)
    dataset = open_dataset('fs_lost_and_found', tmp_path)
    expect(dataset, sorted(LAF_FRAMES), [0, 1, 255], None, 3)
    assert dataset.track == 'anomaly'  # FishyLAFAnomaly-val of road-anomaly-benchmark


def test_fs_static_official(tmp_path: Path) -> None:
    frame = 'frankfurt_000001_046504'
    save(tmp_path / f'data/leftImg8bit/val/frankfurt/{frame}_leftImg8bit.png', picture(100))
    folder = tmp_path / 'fishyscapes' / 'fs_val_v3'
    save(folder / f'0000_{frame}_labels.png', codes(0, 1, 255))
    difference = np.zeros((*SIZE_HW, 3), np.int16)
    difference[0, 1] = (50, -70, 99)
    np.savez_compressed(folder / f'0000_{frame}_rgb.npz', rgb=difference)
    dataset = open_dataset('fs_static', tmp_path / 'fishyscapes', cityscapes=tmp_path / 'data')
    expect(dataset, [f'0000_{frame}'], [0, 1, 255], None, 3)
    image = dataset[0].image_rgb
    assert image[0, 0].tolist() == [100, 60, 200]
    assert image[0, 1].tolist() == [150, 0, 255]
    with pytest.raises(UserError, match='Give the folder of Cityscapes'):
        open_dataset('fs_static', tmp_path / 'fishyscapes')
    (tmp_path / 'data').rename(tmp_path / 'fishyscapes' / 'cityscapes')
    assert len(open_dataset('fs_static', tmp_path / 'fishyscapes')) == 1
    np.savez_compressed(folder / f'0000_{frame}_rgb.npz', rgb=difference[1:])
    dataset = open_dataset('fs_static', tmp_path / 'fishyscapes')
    with pytest.raises(UserError, match=r'rgb\.npz: rgb must have the shape \(6, 8, 3\)'):
        dataset[0]
    for content in (b'PK nothing', b'\xbc\x00' * 50):
        (folder / f'0000_{frame}_rgb.npz').write_bytes(content)
        with pytest.raises(UserError, match=r'rgb\.npz: not a readable archive') as caught:
            dataset[0]
        assert 'allow_pickle' not in str(caught.value), 'advice to execute the file'


def test_fs_static_put_together(tmp_path: Path) -> None:
    write_pair(tmp_path, 'fs_static_images_v2/0000_frankfurt_1_2_rgb.png',
               'fs_val_v2/0000_frankfurt_1_2_labels.png', 0, 1)
    (tmp_path / 'fs_val_v2/0000_frankfurt_1_2_rgb.npz').touch()
    expect(open_dataset('fs_static', tmp_path), ['0000_frankfurt_1_2'], [0, 1], None, 2)


def test_road_anomaly(tmp_path: Path) -> None:
    for frame in ('animals10_x', 'animals2_y'):
        write_pair(tmp_path / 'a', f'frames/{frame}.jpg',
                   f'frames/{frame}.labels/labels_semantic.png', 0, 2)
        save(tmp_path / 'a' / f'frames/{frame}.labels/labels_semantic_color.png', picture(5))
    (tmp_path / 'a' / 'frame_list.json').write_text('[]')
    expect(open_dataset('road_anomaly', tmp_path / 'a'), ['animals2_y', 'animals10_x'], [0, 1],
           None, 2)
    write_pair(tmp_path / 'b', 'images/0.jpg', 'labels_masks/0.png', 0, 2)
    expect(open_dataset('road_anomaly', tmp_path / 'b'), ['0'], [0, 1], None, 2)


def write_lost_and_found(root: Path, split: str, frame: str, *values: int) -> None:
    """Write one frame of Lost & Found."""
    scene = frame[:-14]
    write_pair(root, f'leftImg8bit/{split}/{scene}/{frame}_leftImg8bit.png',
               f'gtCoarse/{split}/{scene}/{frame}_gtCoarse_labelIds.png', *values)
    save(root / f'gtCoarse/{split}/{scene}/{frame}_gtCoarse_labelTrainIds.png', codes(1))


def test_lost_and_found(tmp_path: Path) -> None:
    write_lost_and_found(tmp_path, 'test', '02_Hanns_Klemm_Str_44_000000_000020', 0, 1, 2, 42, 200)
    write_lost_and_found(tmp_path, 'test', '02_Hanns_Klemm_Str_44_000000_000030', 0)
    write_lost_and_found(tmp_path, 'test', '15_Rechbergstr_Deckenpfronn_000001_000020', 0, 1, 5)
    write_lost_and_found(tmp_path, 'test', LAF_FRAMES[0], 0, 1, 7)
    write_lost_and_found(tmp_path, 'train', LAF_FRAMES[1], 0, 1, 9)
    write_lost_and_found(tmp_path, 'train', '01_Hanns_Klemm_Str_45_000001_000240', 0)
    write_lost_and_found(tmp_path, 'train', '10_Schlossberg_9_000004_000020', 0, 1, 9)
    expect(open_dataset('lost_and_found', tmp_path),
           ['02_Hanns_Klemm_Str_44_000000_000020', LAF_FRAMES[0]], [255, 0, 1, 1, 1], None, 5)
    assert len(open_dataset('lost_and_found', tmp_path, split='test')) == 4
    assert len(open_dataset('lost_and_found', tmp_path, split='train')) == 3
    with pytest.raises(UserError, match='97 of the 100 frames of Fishyscapes are not here: 01_Ha'):
        open_dataset('lost_and_found', tmp_path, split='fishyscapes')
    part = open_dataset('lost_and_found', tmp_path, split='fishyscapes', keep_going=True)
    assert part.frame_ids == sorted(LAF_FRAMES) and len(part.problems) == 1


def test_all_frames_of_fishyscapes(tmp_path: Path) -> None:
    """The two frames without labels are in the download, but not in the split."""
    frames = sorted(FISHYSCAPES_FRAMES)
    for index, frame in enumerate(frames):
        write_lost_and_found(tmp_path, 'train' if index % 3 else 'test', frame,
                             *((0,) if index in (5, 50) else (0, 1, 7)))
    assert open_dataset('lost_and_found', tmp_path, split='fishyscapes').frame_ids == [
        frame for index, frame in enumerate(frames) if index not in (5, 50)]


def test_fishyscapes_list_of_frames() -> None:
    assert len(FISHYSCAPES_FRAMES) == 100
    assert {frame[:-14] for frame in FISHYSCAPES_FRAMES} == {
        '01_Hanns_Klemm_Str_45', '04_Maurener_Weg_8', '13_Elly_Beinhorn_Str'}
    assert '13_Elly_Beinhorn_Str_000003_000260' in FISHYSCAPES_FRAMES


def test_streethazards(tmp_path: Path) -> None:
    for town, number in (('t6', 300), ('t5', 1300), ('t5', 300)):
        write_pair(tmp_path, f'test/images/test/{town}/{number}.png',
                   f'test/annotations/test/{town}/{number}.png', 8, 14, 1, 13, 4, 11)
    write_pair(tmp_path, 'train/images/validation/t4/1.png',
               'train/annotations/validation/t4/1.png', 8, 2)
    expect(open_dataset('streethazards', tmp_path), ['t5_300', 't5_1300', 't6_300'],
           [0, 1, 0, 0, 0, 0], [0, 255, 255, 7, 255, 13], 6)
    expect(open_dataset('streethazards', tmp_path, split='validation'), ['t4_1'], [0, 0], [0, 2],
           2)
    with pytest.raises(UserError, match='no streethazards with the split training here, but test, '
                                        'validation'):
        open_dataset('streethazards', tmp_path, split='training')


@pytest.mark.parametrize(('image', 'mask', 'shift', 'void'), [
    ('seg/images/{folder}/{name}.jpg', 'seg/train_labels/{folder}/{name}_train_id.png', 2, 1),
    ('seg/images/{folder}/{name}.jpg', 'seg/labels/{folder}/{name}_train_id.png', 0, 255),
    ('bdd100k/seg/images/{folder}/{name}.jpg', 'bdd100k/seg/labels/{folder}/{name}_train_id.png',
     0, 255),
    ('images/10k/{folder}/{name}.jpg', 'labels/sem_seg/masks/{folder}/{name}.png', 0, 255),
])
def test_bdd_anomaly(tmp_path: Path, image: str, mask: str, shift: int, void: int) -> None:
    for folder, name, train_ids in (('train', '0a-1', (0, 18, 8)), ('train', '0b-2', (0, 13, 8)),
                                    ('val', '7c-3', (16, 0, 8)), ('val', '7d-4', (15, 0, 8)),
                                    ('val', '7e-5', (2, 17, 8))):
        values = [train + shift for train in train_ids]
        write_pair(tmp_path, image.format(folder=folder, name=name),
                   mask.format(folder=folder, name=name), *values, void)
    expect(open_dataset('bdd_anomaly', tmp_path), ['0a-1', '7c-3', '7e-5'], [0, 1, 0, 255],
           [0, 18, 8, 255], 4)
    assert open_dataset('bdd_anomaly', tmp_path, split='train').frame_ids == ['0b-2']
    assert open_dataset('bdd_anomaly', tmp_path, split='validation').frame_ids == ['7d-4']


def test_unreadable_masks_do_not_choose_the_split(tmp_path: Path) -> None:
    for name in ('a', 'b'):
        write_pair(tmp_path, f'images/10k/val/{name}.jpg', f'labels/sem_seg/masks/val/{name}.png',
                   0, 17)
    (tmp_path / 'labels/sem_seg/masks/val/a.png').write_bytes(b'nothing')
    with pytest.raises(UserError, match=r'a\.png: not a readable mask'):
        open_dataset('bdd_anomaly', tmp_path)
    dataset = open_dataset('bdd_anomaly', tmp_path, keep_going=True)
    assert dataset.frame_ids == ['b'] and len(dataset.problems) == 1


CITYSCAPES_IDS = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10,
                  24: 11, 25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}


def test_cityscapes_label_ids(tmp_path: Path) -> None:
    values = list(range(34))
    for split, city in (('train', 'aachen'), ('val', 'frankfurt'), ('val', 'munster')):
        frame = f'{city}_000000_000019'
        write_pair(tmp_path, f'leftImg8bit/{split}/{city}/{frame}_leftImg8bit.png',
                   f'gtFine/{split}/{city}/{frame}_gtFine_labelIds.png', *values)
        save(tmp_path / f'gtFine/{split}/{city}/{frame}_gtFine_color.png', picture(2))
        save(tmp_path / f'gtFine/{split}/{city}/{frame}_gtFine_instanceIds.png',
             np.zeros(SIZE_HW, np.uint16))
    dataset = open_dataset('cityscapes', tmp_path)
    assert dataset.split == 'val'
    expect(dataset, ['frankfurt_000000_000019', 'munster_000000_000019'], None,
           [CITYSCAPES_IDS.get(value, 255) for value in values], 34)
    train = open_dataset('cityscapes', tmp_path, split='train')
    assert train.frame_ids == ['aachen_000000_000019']


def test_cityscapes_train_ids_and_flat_folder(tmp_path: Path) -> None:
    write_pair(tmp_path / 'tree', 'leftImg8bit/train/ulm/ulm_0_1_leftImg8bit.png',
               'gtFine/train/ulm/ulm_0_1_gtFine_labelTrainIds.png', 0, 18, 255)
    dataset = open_dataset('cityscapes', tmp_path / 'tree')
    assert dataset.split == 'train'
    expect(dataset, ['ulm_0_1'], None, [0, 18, 255], 3)
    write_pair(tmp_path / 'flat', 'a_0_1_leftImg8bit.png', 'a_0_1_gtFine_labelIds.png', 7, 33, 0)
    save(tmp_path / 'flat' / 'a_0_1_gtFine_labelTrainIds.png', codes(0, 18, 255))
    expect(open_dataset('cityscapes', tmp_path / 'flat'), ['a_0_1'], None, [0, 18, 255], 3)
    (tmp_path / 'flat' / 'a_0_1_gtFine_labelIds.png').unlink()
    expect(open_dataset('cityscapes', tmp_path / 'flat'), ['a_0_1'], None, [0, 18, 255], 3)


@pytest.mark.parametrize(('kind', 'values'), [('labelTrainIds', (0, 13, 255)),
                                              ('labelIds', (7, 26, 4))])
def test_acdc(tmp_path: Path, kind: str, values: tuple[int, ...]) -> None:
    for weather in ('fog', 'night', 'rain', 'snow'):
        for split in ('train', 'val'):
            frame = f'GOPR_{split}_frame_000001'
            write_pair(tmp_path, f'rgb_anon/{weather}/{split}/GOPR/{frame}_rgb_anon.png',
                       f'gt/{weather}/{split}/GOPR/{frame}_gt_{kind}.png', *values)
            save(tmp_path / f'gt/{weather}/{split}/GOPR/{frame}_gt_invIds.png', codes(1))
            write_pair(tmp_path, f'rgb_anon/{weather}/{split}_ref/GOPR/{frame}_ref_rgb_anon.png',
                       None)
    expect(open_dataset('acdc', tmp_path),
           [f'{weather}_GOPR_val_frame_000001' for weather in ('fog', 'night', 'rain', 'snow')],
           None, [0, 13, 255], 3)
    expect(open_dataset('acdc', tmp_path, weather='rain', split='train'),
           ['rain_GOPR_train_frame_000001'], None, [0, 13, 255], 3)
    with pytest.raises(UserError, match=r'no weather .hail.*fog, night, rain, snow or all'):
        open_dataset('acdc', tmp_path, weather='hail')


def write_idd(root: Path, kind: str, *values: int) -> None:
    """Write two frames of one name from two drives."""
    for drive in ('201', '30'):
        write_pair(root, f'leftImg8bit/val/{drive}/frame0029_leftImg8bit.png',
                   f'gtFine/val/{drive}/frame0029_gtFine_label{kind}.png', *values)


def test_idd_level_3(tmp_path: Path) -> None:
    values = (0, 2, 4, 8, 16, 17, 23, 9, 22, 25, 1, 3, 12, 13, 21, 255)
    write_idd(tmp_path, 'level3Ids', *values)
    expect(open_dataset('idd', tmp_path), ['30_frame0029', '201_frame0029'],
           [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, *[255] * 6],
           [0, 1, 11, 255, 255, 255, 255, 13, 2, 10, *[255] * 6], 16)
    only = open_dataset('idd', tmp_path, unknown='autorickshaw, curb')
    assert first_pixels(only[0].anomaly_mask, 14) == [
        0, 0, 0, 1, 255, 255, 255, 0, 0, 0, 255, 255, 255, 1]
    # Level-3 id 1 is parking and drivable fallback.
    with pytest.raises(UserError, match='do not tell animal, parking apart'):
        open_dataset('idd', tmp_path, unknown=['animal', 'parking', 'curb'])
    with pytest.raises(UserError, match='cow cannot be the unknown class'):
        open_dataset('idd', tmp_path, unknown=['cow'])


def test_idd_ids(tmp_path: Path) -> None:
    write_idd(tmp_path / 'IDD_Segmentation', 'ids', 0, 7, 11, 31, 12, 17, 35, 28)
    expect(open_dataset('idd', tmp_path), ['30_frame0029', '201_frame0029'],
           [0, 255, 1, 1, 0, 0, 255, 255], [0, 255, 255, 255, 13, 16, 255, 255], 8)
    animals = open_dataset('idd', tmp_path, unknown='animal')
    assert first_pixels(animals[0].anomaly_mask, 4) == [0, 1, 255, 255]
    write_idd(tmp_path / 'parking', 'ids', 1, 2, 0)
    parking = open_dataset('idd', tmp_path / 'parking', unknown='parking')
    assert first_pixels(parking[0].anomaly_mask, 3) == [1, 255, 0]


CONFIG: dict[str, Any] = {
    'name': 'yard', 'images': 'photos', 'masks': 'photos', 'mask_suffix': '_mask',
    'anomaly': {3: 'in-distribution', 7: 'anomaly', 9: 'void'}, 'labels': {3: 0, 7: 255, 9: 4}}


def test_folder(tmp_path: Path) -> None:
    write_pair(tmp_path, 'photos/day/1.jpg', 'photos/day/1_mask.png', 3, 7, 9)
    write_pair(tmp_path, 'photos/night/1.jpg', 'photos/night/1_mask.png', 7, 3, 9)
    (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump(CONFIG))
    dataset = open_dataset('folder', tmp_path)
    expect(dataset, ['day_1', 'night_1'], [0, 1, 255], [0, 255, 4], 3)
    assert dataset.name == 'yard'
    (tmp_path / 'dataset.yaml').rename(tmp_path / 'other.yaml')
    assert len(open_dataset('folder', tmp_path, config=tmp_path / 'other.yaml')) == 2
    write_pair(tmp_path, 'photos/night/2.jpg', 'photos/night/2_mask.png', 3, 4)
    dataset = open_dataset('folder', tmp_path, config=tmp_path / 'other.yaml')
    with pytest.raises(UserError, match=r'2_mask\.png: masks of yard hold 3, 7, 9.* also 4'):
        dataset[2]


@pytest.mark.parametrize(('changes', 'image', 'mask'), [
    # One folder: the longer suffix tells, whichever it is.
    ({'image_suffix': '_img', 'mask_suffix': ''}, 'photos/1_img.png', 'photos/1.png'),
    ({'image_suffix': '_a_m', 'mask_suffix': '_m'}, 'photos/1_a_m.png', 'photos/1_m.png'),
    ({'image_suffix': '_m', 'mask_suffix': '_a_m'}, 'photos/1_m.png', 'photos/1_a_m.png'),
    # Ways to write a folder.
    ({'images': './photos', 'masks': 'masks/./', 'mask_suffix': ''}, 'photos/1.png',
     'masks/1.png'),
    ({'images': '.', 'masks': 'masks', 'mask_suffix': ''}, '1.png', 'masks/1.png'),
    ({'images': './photos', 'masks': '.', 'mask_suffix': ''}, 'photos/1.png', '1.png'),
    ({'images': '.', 'masks': '.'}, '1.png', '1_mask.png'),
    ({'images': 'photos', 'masks': 'photos/masks', 'mask_suffix': ''}, 'photos/1.png',
     'photos/masks/1.png'),
    # Endings in capitals, as cameras write them.
    ({'masks': 'masks', 'mask_suffix': ''}, 'photos/1.JPG', 'masks/1.PNG')])
def test_folder_descriptions(tmp_path: Path, changes: dict[str, Any], image: str,
                             mask: str) -> None:
    (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump({**CONFIG, **changes}))
    for folder in ('', 'night/'):  # sub-folders are searched
        write_pair(tmp_path, *(f'{name.rpartition("/")[0]}/{folder}{name.rpartition("/")[2]}'
                               .lstrip('/') for name in (image, mask)), 3, 7, 9)
    dataset = open_dataset('folder', tmp_path)
    expect(dataset, ['1', 'night_1'], [0, 1, 255], [0, 255, 4], 3)


def test_hidden_files_are_no_frames(tmp_path: Path) -> None:
    """The ._NAME of macOS beside each NAME is none; Jupyter copies into .ipynb_checkpoints."""
    (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump({**CONFIG, 'images': '.', 'masks': '.'}))
    write_pair(tmp_path, '1.png', '1_mask.png', 3, 7, 9)
    write_pair(tmp_path, '.ipynb_checkpoints/1.png', None)
    for name in ('._1.png', '._1_mask.png'):
        (tmp_path / name).write_bytes(b'\x00\x05\x16\x07')
    assert open_dataset('folder', tmp_path).frame_ids == ['1']
    write_pair(tmp_path / 'simple', 'images/0.png', 'labels_masks/0.png', 0, 1)
    (tmp_path / 'simple/images/._0.png').write_bytes(b'\x00\x05\x16\x07')
    assert open_dataset('fs_static', tmp_path / 'simple').frame_ids == ['0']
    assert ImageFolder(tmp_path / 'simple/images').frame_ids == ['0']


@pytest.mark.parametrize(('changes', 'text'), [
    ({'images': None}, 'needs images: a folder'),
    ({'masks': 5}, 'needs masks: a folder'),
    ({'images': '/data/photos'}, 'images: .* below the root, got the absolute path /data/photos'),
    ({'images': './photos', 'masks': 'photos/', 'mask_suffix': ''}, 'cannot be told apart'),
    ({'extra': 1}, 'unknown keys: extra'),
    ({'mask_suffix': ''}, 'cannot be told apart'),
    ({'anomaly': None, 'labels': None}, 'needs anomaly, labels or both'),
    ({'anomaly': {0: 'cow'}}, 'code 0 must mean one of in-distribution, anomaly, void'),
    ({'anomaly': {300: 'void'}}, 'whole numbers 0 to 255, got 300'),
    ({'anomaly': ['void']}, 'must map codes'),
    ({'labels': {0: 'road'}}, 'must be a train id'),
    ({'image_suffix': 3}, 'needs text for image_suffix'),
])
def test_wrong_folder_descriptions(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump({**CONFIG, **changes}))
    with pytest.raises(UserError, match=text) as caught:
        open_dataset('folder', tmp_path)
    assert 'dataset.yaml' in str(caught.value) and 'in-distribution' in str(caught.value)


def test_the_example_of_a_folder_description_works(tmp_path: Path) -> None:
    from anomaly_seg_ros.datasets.folder import EXAMPLE
    (tmp_path / 'dataset.yaml').write_text(EXAMPLE)
    write_pair(tmp_path, 'images/1.jpg', 'labels/1_labels.png', 0, 1, 255)
    expect(open_dataset('folder', tmp_path), ['1'], [0, 1, 255], [0, 255, 255], 3)
    (tmp_path / 'dataset.yaml').write_text('just text')
    with pytest.raises(UserError, match='must hold keys and values'):
        open_dataset('folder', tmp_path)
    (tmp_path / 'dataset.yaml').write_text('a: [b')
    with pytest.raises(UserError, match='is no YAML'):
        open_dataset('folder', tmp_path)


@pytest.mark.parametrize('name', DATASETS)
def test_a_wrong_root_says_what_was_looked_for_and_found(tmp_path: Path, name: str) -> None:
    (tmp_path / 'holiday').mkdir()
    (tmp_path / 'list.txt').touch()
    if name == 'folder':
        (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(UserError) as caught:
        open_dataset(name, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and 'holiday/' in message and 'list.txt' in message
    for layout in DATASETS[name].layouts:
        assert layout.text in message
    if name != 'folder':
        assert DATASETS[name].source and DATASETS[name].source in message
        with pytest.raises(UserError, match='no such folder'):
            open_dataset(name, tmp_path / 'none')


def test_unknown_names_and_splits(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r'road_anomaly_21, road_obstacle_21.*folder'):
        open_dataset('imagenet', tmp_path)
    write_pair(tmp_path, 'images/0.png', 'labels_masks/0.png', 0)
    with pytest.raises(UserError, match=r"no split 'val'.*validation, test, all"):
        open_dataset('road_anomaly_21', tmp_path, split='val')
    with pytest.raises(UserError, match='Leave the split out'):
        open_dataset('fs_static', tmp_path, split='val')
    with pytest.raises(UserError, match='with the split test here, but validation'):
        open_dataset('road_anomaly_21', tmp_path, split='test')


def test_files_that_do_not_pair(tmp_path: Path) -> None:
    for number in range(4):
        write_pair(tmp_path, f'images/{number}.jpg', f'labels_masks/{number}.png', 0, 1)
    (tmp_path / 'images/1.jpg').unlink()
    (tmp_path / 'labels_masks/2.png').unlink()
    save(tmp_path / 'images/3.png', picture(1))
    with pytest.raises(UserError) as caught:
        open_dataset('fs_static', tmp_path)
    for text in ('3 files', '1.png: no image', '2.jpg: no mask', '3.png: its frame name 3',
                 'Download the missing files'):
        assert text in str(caught.value)
    # make-bag and calibrate, which pass this message on, have no such option.
    assert '--keep-going' not in str(caught.value)
    dataset = open_dataset('fs_static', tmp_path, keep_going=True)
    assert dataset.frame_ids == ['0', '3'] and len(dataset.problems) == 3
    assert dataset.check() == list(dataset.problems)
    assert first_pixels(dataset[1].anomaly_mask, 2) == [0, 1]  # that of its image


def test_nothing_pairs(tmp_path: Path) -> None:
    save(tmp_path / 'images/a.png', picture(1))
    save(tmp_path / 'labels_masks/b.png', codes(0))
    with pytest.raises(UserError) as caught:
        open_dataset('fs_static', tmp_path, keep_going=True)
    for text in ('2 files of fs_static do not pair', 'a.png: no mask', 'b.png: no image'):
        assert text in str(caught.value)
    config = {'images': 'images', 'masks': 'labels_masks', 'mask_suffix': '_gt',
              'anomaly': {0: 'in-distribution', 1: 'anomaly'}}
    (tmp_path / 'dataset.yaml').write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=r'a\.png: no mask\n.* mask_suffix in .*dataset\.yaml, '
                                        r'which are \'\' and \'_gt\''):
        open_dataset('folder', tmp_path, keep_going=True)


@pytest.mark.parametrize('absent', ['leftImg8bit', 'gtFine'])
def test_a_split_of_which_half_is_there_is_not_passed_over(tmp_path: Path, absent: str) -> None:
    """Train is whole and would be scored in place of val, which was meant to be there."""
    for split in ('val', 'train'):
        write_pair(tmp_path, f'leftImg8bit/{split}/x/x_{split}_leftImg8bit.png',
                   f'gtFine/{split}/x/x_{split}_gtFine_labelIds.png', 7)
    shutil.rmtree(tmp_path / absent / 'val')
    missing = 'no image' if absent == 'leftImg8bit' else 'no mask'
    for split in (None, 'val'):
        with pytest.raises(UserError) as caught:
            open_dataset('cityscapes', tmp_path, split=split, keep_going=True)
        for text in ('1 files of cityscapes (val) do not pair', 'x_val_', missing,
                     'or choose another split (train, test)'):
            assert text in str(caught.value)
    assert open_dataset('cityscapes', tmp_path, split='train').shortfall() is None


def test_images_that_need_no_masks_are_no_half_of_another_split(tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/zebra0000.jpg', None)
    (tmp_path / 'labels_masks').mkdir()
    dataset = open_dataset('road_anomaly_21', tmp_path)
    assert dataset.split == 'test' and dataset.frame_ids == ['zebra0000']
    save(tmp_path / 'images/validation0000.jpg', picture(1))
    with pytest.raises(UserError, match=r'validation0000\.jpg: no mask'):
        open_dataset('road_anomaly_21', tmp_path)


def test_other_splits_are_looked_for_where_archives_unpack_to(tmp_path: Path) -> None:
    write_pair(tmp_path, 'dataset_AnomalyTrack/images/validation0.png',
               'dataset_AnomalyTrack/labels_masks/validation0_labels_semantic.png', 0, 1)
    with pytest.raises(UserError, match='with the split test here, but validation, all'):
        open_dataset('road_anomaly_21', tmp_path, split='test')


def test_frames_that_a_benchmark_has_more_of_are_counted(tmp_path: Path) -> None:
    for number in range(2):
        write_pair(tmp_path, f'images/{number}.jpg', f'labels_masks/{number}.png', 0, 1)
    assert open_dataset('fs_static', tmp_path).shortfall() == '2 of 30'
    assert open_dataset('road_obstacle_21', tmp_path).shortfall() == '2 of 30'
    for number in range(2, 30):
        write_pair(tmp_path, f'images/{number}.jpg', f'labels_masks/{number}.png', 0, 1)
    assert open_dataset('fs_static', tmp_path).shortfall() is None
    assert ImageFolder(tmp_path / 'images').shortfall() is None
    for adapter in DATASETS.values():
        assert set(adapter.frame_counts) <= set(adapter.splits or (None,))


def test_bad_files_are_named_and_do_not_stop_the_others(tmp_path: Path) -> None:
    for number in range(6):
        write_pair(tmp_path, f'images/{number}.jpg', f'labels_masks/{number}.png', 0, 1)
    save(tmp_path / 'labels_masks/1.png', codes(0, 2))
    save(tmp_path / 'labels_masks/2.png', codes(0)[:-1])
    image = (tmp_path / 'images/3.jpg').read_bytes()
    (tmp_path / 'images/3.jpg').write_bytes(image[:len(image) - 40])
    (tmp_path / 'labels_masks/4.png').write_bytes(b'not a mask')
    dataset = open_dataset('fs_lost_and_found', tmp_path)
    texts = {1: r'labels_masks/1\.png.* hold 0-1, 255, this one has also 2',
             2: r'labels_masks/2\.png: the mask has 8x5 pixels, its image 2\.jpg 8x6',
             3: r'images/3\.jpg', 4: r'labels_masks/4\.png: not a readable mask'}
    for index, text in texts.items():
        with pytest.raises(UserError, match=text):
            dataset[index]
    assert [dataset[index].frame_id for index in (0, 5)] == ['0', '5']
    problems = dataset.check()
    assert len(problems) == 4
    for problem, name in zip(problems, ('1.png', '2.png', '3.jpg', '4.png'), strict=True):
        assert name in problem


def test_road_anomaly_and_smiyc_codes_are_not_mixed_up(tmp_path: Path) -> None:
    write_pair(tmp_path, 'images/0.png', 'labels_masks/0.png', 0, 2)
    with pytest.raises(UserError, match='hold 0-1, 255, this one has also 2'):
        open_dataset('road_anomaly_21', tmp_path)[0]
    save(tmp_path / 'labels_masks/0.png', codes(0, 1))
    with pytest.raises(UserError, match='hold 0, 2, this one has also 1'):
        open_dataset('road_anomaly', tmp_path)[0]


def test_the_content_decides_the_image_format(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    data = cv2.imencode('.jpg', image)[1].tobytes()
    (tmp_path / 'a.png').write_bytes(data)
    np.testing.assert_array_equal(
        read_image(tmp_path / 'a.png'),
        cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
    assert file_size_hw(tmp_path / 'a.png') == (16, 16)
    for ending in ('.bmp', '.tiff', '.ppm'):
        save(tmp_path / f'b{ending}', image)
        np.testing.assert_array_equal(read_image(tmp_path / f'b{ending}'), image)
    (tmp_path / 'b.bmp').write_bytes(b'BM')
    with pytest.raises(UserError, match=r'b\.bmp: not a readable image'):
        read_image(tmp_path / 'b.bmp')
    with pytest.raises(UserError, match=r'none\.png: cannot be read'):
        read_image(tmp_path / 'none.png')


@pytest.mark.parametrize('content', ['.jpg', '.png', '.webp', 'text'])
def test_a_broken_file_is_not_the_fault_of_a_publisher(tmp_path: Path, content: str) -> None:
    """The remedies of messages are left out, whichever part of the file is read."""
    data = b'<html>not found</html>'
    if content != 'text':
        image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        data = cv2.imencode(content, image)[1].tobytes()
    path = tmp_path / 'a.jpg'
    for length in (len(data) // 2, 12):
        path.write_bytes(data[:length])
        for read in (read_image, file_size_hw):
            with pytest.raises(UserError, match=r'a\.jpg: .* Download or copy') as error:
                read(path)
            assert 'publisher' not in str(error.value) and 'transport' not in str(error.value)


def test_gamma_in_a_png_is_ignored(tmp_path: Path) -> None:
    """Lost & Found's images carry a gamma that would wash them out."""
    import struct
    import zlib
    image = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    data = cv2.imencode('.png', image[..., ::-1])[1].tobytes()
    body = b'gAMA' + struct.pack('>I', 100_000)
    chunk = struct.pack('>I', 4) + body + struct.pack('>I', zlib.crc32(body))
    (tmp_path / 'a.png').write_bytes(data[:33] + chunk + data[33:])
    np.testing.assert_array_equal(read_image(tmp_path / 'a.png'), image)


def test_masks_in_other_clothes(tmp_path: Path) -> None:
    pil = pytest.importorskip('PIL.Image', reason='writes palette images')
    mask = np.array([[0, 1, 255], [7, 3, 0]], np.uint8)
    path = tmp_path / 'mask.png'
    save(path, np.repeat(mask[..., None], 3, axis=2))
    np.testing.assert_array_equal(read_mask(path), mask)
    picture_p = pil.fromarray(mask, mode='P')
    rng = np.random.default_rng(1)
    palette = rng.permutation(256)
    colours = np.stack([palette, palette[::-1], rng.integers(0, 256, 256)], axis=1)
    picture_p.putpalette(colours.astype(np.uint8).tobytes())
    picture_p.save(path)
    np.testing.assert_array_equal(read_mask(path), mask)
    # Cityscapes' colours, padded with black: one colour for several codes.
    picture_p.putpalette(colours[:3].astype(np.uint8).tobytes() + bytes(759))
    picture_p.save(path, transparency=bytes([0, 128]))
    np.testing.assert_array_equal(read_mask(path), mask)
    save(path, np.dstack([mask, mask, mask + 1]))
    with pytest.raises(UserError, match='got a colour image'):
        read_mask(path)
    save(path, mask.astype(np.uint16))
    with pytest.raises(UserError, match='8 bits a pixel, got uint16'):
        read_mask(path)
    save(path, mask)
    whole = path.read_bytes()
    path.write_bytes(cv2.imencode('.jpg', mask)[1].tobytes())  # loses codes
    with pytest.raises(UserError, match='must be a whole PNG file'):
        read_mask(path)
    for kept in (0, len(whole) // 2, len(whole) - 12):  # the last 12 bytes are the end chunk
        path.write_bytes(whole[:kept])
        with pytest.raises(UserError, match='not a readable mask'):
            read_mask(path)


def png_of_few_bits(stored: np.ndarray, bits: int, colour_type: int) -> bytes:
    """Write a PNG by hand, all colours of its palette black; rows must fill whole bytes."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack(
            '>I', zlib.crc32(kind + content))

    height, width = stored.shape
    bit_rows = np.unpackbits(stored[..., None], axis=2)[..., -bits:].reshape(height, -1)
    rows = b''.join(b'\0' + row.tobytes() for row in np.packbits(bit_rows, axis=1))
    return b''.join((
        b'\x89PNG\r\n\x1a\n',
        chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour_type, 0, 0, 0)),
        chunk(b'PLTE', bytes(3 << bits)) if colour_type == 3 else b'',
        chunk(b'IDAT', zlib.compress(rows)), chunk(b'IEND', b'')))


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_masks_of_few_bits(tmp_path: Path, bits: int) -> None:
    """Indices are codes; OpenCV stretches grey, so that a boolean mask's 1 would be void."""
    stored = np.random.default_rng(bits).integers(0, 1 << bits, (5, 16), dtype=np.uint8)
    path = tmp_path / 'mask.png'
    path.write_bytes(png_of_few_bits(stored, bits, 3))
    np.testing.assert_array_equal(read_mask(path), stored)
    path.write_bytes(png_of_few_bits(stored, bits, 0))
    with pytest.raises(UserError, match=rf'mask\.png: .* 8 bits a pixel, got {bits}, .*uint8'):
        read_mask(path)


def test_natural_order() -> None:
    names = ['10', '2', 'b', 'a10', 'a9', '0', '1', 'a', 'a9b']
    assert sorted(names, key=natural_key) == [
        '0', '1', '2', '10', 'a', 'a9', 'a9b', 'a10', 'b']


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    write_pair(tmp_path / 'disk', 'aachen/a_0_1_leftImg8bit.png', None)
    save(tmp_path / 'data/gtFine/train/aachen/a_0_1_gtFine_labelIds.png', codes(7))
    (tmp_path / 'data/leftImg8bit').mkdir()
    (tmp_path / 'data/leftImg8bit/train').symlink_to(tmp_path / 'disk')
    assert open_dataset('cityscapes', tmp_path / 'data').frame_ids == ['a_0_1']


def test_data_sets_survive_pickling(tmp_path: Path) -> None:
    """Evaluation on several processes sends them."""
    import pickle
    write_pair(tmp_path, 'images/0.png', 'labels_masks/0.png', 0, 1)
    dataset = pickle.loads(pickle.dumps(open_dataset('fs_static', tmp_path)))
    expect(dataset, ['0'], [0, 1], None, 2)


@pytest.mark.parametrize(('name', 'count', 'size_hw', 'found'), [
    ('road_anomaly_21', 10, (720, 1280), {0, 1, 255}),
    ('road_obstacle_21', 15, (1080, 1920), {0, 1, 255}),
    ('fs_lost_and_found', 20, (1024, 2048), {0, 1, 255}),
    ('fs_static', 15, (1024, 2048), {0, 1, 255}),
    ('road_anomaly', 30, (720, 1280), {0, 1}),
])
def test_real_anomaly_sets(real_data: Path, name: str, count: int, size_hw: tuple[int, int],
                           found: set[int]) -> None:
    dataset = open_dataset(name, real_data / 'anomaly' / name)
    assert len(dataset) == count
    assert dataset.frame_ids == sorted(dataset.frame_ids, key=int)
    assert dataset.check() == []
    seen: set[int] = set()
    for index in (0, count // 2, count - 1):
        frame = dataset[index]
        assert frame.image_rgb.shape == (*size_hw, 3) and frame.image_rgb.std() > 20
        assert frame.anomaly_mask is not None and frame.anomaly_mask.shape == size_hw
        seen |= set(np.unique(frame.anomaly_mask).tolist())
    assert seen == found


def test_real_cityscapes(real_data: Path) -> None:
    dataset = open_dataset('cityscapes', real_data / 'cityscapes')
    assert len(dataset) == 8 and dataset.split == 'train' and dataset.check() == []
    assert dataset.frame_ids[0] == 'aachen_000000_000019'
    labels = dataset[0].labels
    assert labels is not None and 0.2 < np.mean(labels == 0) < 0.6
    tiny = real_data / 'cityscapes' / 'tiny'
    frame = open_dataset('cityscapes', tiny)[0]
    # Both files were made smaller on their own, so a few pixels at borders differ.
    train_ids = cv2.imread(str(next(tiny.glob('*labelTrainIds.png'))), -1)
    assert np.mean(frame.labels == train_ids) > 0.997


def test_the_page_describes_every_data_set() -> None:
    from anomaly_seg_ros.datasets.folder import EXAMPLE
    page = (Path(__file__).parent.parent / 'docs' / 'datasets.md').read_text()
    for name, adapter in DATASETS.items():
        row = next(line for line in page.splitlines() if line.startswith(f'| `{name}`'))
        for split in adapter.splits:
            assert f'`{split}`' in row
    assert EXAMPLE in page
