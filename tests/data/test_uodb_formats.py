"""Text and csv formats of UODB: files written by hand, converted, compared number by number; then broken ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from uodb_files import assert_faults, converted, kitti_row, picture, write

from gppf_ds.data.sets.uodb import CONVERSIONS, DOTA_CLASSES, SOURCES, places, prepare
from gppf_ds.errors import UserError


def test_kitti(tmp_path: Path) -> None:
    rows = {
        0: [
            kitti_row("Car", 10.5, 20.25, 40.0, 50.0),
            kitti_row("Van", 1, 2, 3, 4),
            kitti_row("Person_sitting", 5, 5, 9, 9),
            kitti_row("Tram", 5, 5, 9, 9),
            kitti_row("DontCare", 60, 0, 99.5, 20),
        ],
        1: [kitti_row("Bus", 1, 1, 9, 9), kitti_row("Car", 1, 1, "x", 9), "Car 1 2", kitti_row("Car", 100, 0, 110, 9)],
        2: [kitti_row("Cyclist", 1, 1, 9, 9)],
        14: [kitti_row("Pedestrian", 0, 0, 10, 30)],
    }
    for index in range(16):
        if index != 2:
            picture(tmp_path / "training" / "image_2" / f"{index:06d}.png")
        if index != 3:
            write(tmp_path / "training" / "label_2" / f"{index:06d}.txt", "\n".join(rows.get(index, [])))
    found = converted("uodb_kitti", tmp_path)
    assert found["val"] == ({"training/image_2/000014.png": [("pedestrian", 0, 0, 10, 30, False)]}, [])
    objects, faults = found["train"]
    dont_care = [(name, 60, 0, 39.5, 20, True) for name in ("pedestrian", "cyclist", "car")]
    assert objects.pop("training/image_2/000000.png") == [
        ("car", 10.5, 20.25, 29.5, 29.75, False),
        ("car", 1, 2, 2, 2, True),
        ("pedestrian", 5, 5, 4, 4, True),
        *dont_care,
    ]
    assert len(objects) == 12  # images without an object stay: 16, less one held out, two broken and the first
    assert not any(objects.values())
    labels = tmp_path / "training" / "label_2"
    expected = [
        (f"{labels}/000001.txt:1", "the class 'Bus' is unknown"),
        (f"{labels}/000001.txt:2", "no readable number"),
        (f"{labels}/000001.txt:3", "3 fields in place of 15"),
        (f"{labels}/000001.txt:4", "lies outside its image"),
        (f"{labels}/000002.txt", "000002.png does not exist"),
        (f"{labels}/000003.txt", "the label file cannot be read"),
    ]
    assert_faults(faults, expected)


def test_wider_face(tmp_path: Path) -> None:
    text = """0--Parade/a.jpg
2
10 20 30 40 0 0 0 0 0 0
50 5 8 9 2 0 0 1 2 0
0--Parade/b.jpg
0
0 0 0 0 0 0 0 0 0 0
0--Parade/c.jpg
3
10 20 30 40 0 0 0 0 0 0
10 20 0 40 0 0 0 0 0 0
10 20 30 0 0 0
10 twenty 30 0 0 0 0 0 0 0
0--Parade/d.jpg
1
10 20 30 40 0 0 0 0 0 0
0--Parade/e.jpg
"""
    lists = tmp_path / "wider_face_split"
    write(lists / "wider_face_train_bbx_gt.txt", text)
    write(lists / "wider_face_val_bbx_gt.txt", "1--Handshaking/a.jpg\n1\n1 2 3 4 0 0 0 0 0 0 \n")
    for name in "abce":
        picture(tmp_path / "WIDER_train" / "images" / "0--Parade" / f"{name}.jpg")
    picture(tmp_path / "WIDER_val" / "images" / "1--Handshaking" / "a.jpg")
    found = converted("uodb_widerface", tmp_path)
    assert found["val"] == ({"WIDER_val/images/1--Handshaking/a.jpg": [("face", 1, 2, 3, 4, False)]}, [])
    objects, faults = found["train"]
    folder = "WIDER_train/images/0--Parade"
    assert objects == {
        f"{folder}/a.jpg": [("face", 10, 20, 30, 40, False), ("face", 50, 5, 8, 9, True)],
        f"{folder}/b.jpg": [],
        f"{folder}/c.jpg": [("face", 10, 20, 30, 40, False)],
        f"{folder}/e.jpg": [],
    }
    source = f"{lists}/wider_face_train_bbx_gt.txt"
    expected = [
        (f"{source}:9", "3 faces are announced and 4 rows follow"),
        (f"{source}:12", "6 fields in place of 10"),
        (f"{source}:13", "no readable number"),
        (f"{source}:11", "has no area"),
        (f"{source}:14", "d.jpg does not exist"),
        (f"{source}:17", "no number of faces"),
    ]
    assert_faults(faults, expected)
    assert SOURCES["uodb_widerface"].count(tmp_path) == {"train images": 5, "val images": 1}


def test_lisa(tmp_path: Path) -> None:
    header = (
        "Filename;Annotation tag;Upper left corner X;Upper left corner Y;Lower right corner X;Lower right corner Y;"
    )
    header += "Occluded,On another road;Origin file;Origin frame number;Origin track;Origin track frame number"
    rows = [header]
    for track in range(5):
        picture(tmp_path / "clip" / f"{track}.png")
        rows.append(f"clip/{track}.png;speedLimit{track}5;1;2;{11 + track};22;0,0;clip.avi;7;track{track};0")
    end = "0,0;clip.avi;7;track0;1"
    rows += [
        f"clip/0.png;noLeftTurn;30;40;50;60;{end}",
        f"clip/0.png;signalAhead;30;40;50;70;{end}",
        f"clip/0.png;yield;30;40;50;70;{end}",
        f"clip/0.png;banana;30;40;50;70;{end}",
        f"clip/0.png;stop;30;4o;50;70;{end}",
        f"clip/0.png;stop;30;40;50;{end}",
        f"clip/0.png;stop;30;90;50;95;{end}",
        f"clip/9.png;stop;30;40;50;70;{end}",
    ]
    write(tmp_path / "allAnnotations.csv", "\n".join(rows) + "\n")
    found = converted("uodb_lisa", tmp_path)
    assert found["val"] == ({"clip/4.png": [("speedlimit", 1, 2, 14, 20, False)]}, [])
    objects, faults = found["train"]
    assert list(objects) == [f"clip/{track}.png" for track in range(4)]
    assert objects["clip/0.png"] == [
        ("speedlimit", 1, 2, 10, 20, False),
        ("noturn", 30, 40, 20, 20, False),
        ("warning", 30, 40, 20, 30, False),
    ]
    source = tmp_path / "allAnnotations.csv"
    expected = [
        (f"{source}:12", "10 fields in place of 11"),
        (f"{source}:10", "the class 'banana' is unknown"),
        (f"{source}:11", "no readable number"),
        (f"{source}:13", "lies outside its image"),
        (f"{source}:14", "9.png does not exist"),
    ]
    assert_faults(faults, expected)
    write(source, "Filename,Annotation tag\n")
    with pytest.raises(UserError, match=r"allAnnotations.csv:1: there is no column 'Filename'"):
        prepare("uodb_lisa", tmp_path)


def test_every_tag_of_lisa_is_known(tmp_path: Path) -> None:
    numbers = {"speedLimit": "15 25 30 35 40 45 50 55 65 Urdbl", "rampSpeedAdvisory": "20 35 40 45 50 Urdbl"}
    numbers |= {"schoolSpeedLimit": "25", "truckSpeedLimit": "55", "zoneAhead": "25 45"}
    tags = [f"{name}{number}" for name, listed in numbers.items() for number in listed.split()]
    tags += [f"curve{side}" for side in ("Left", "Right")] + [f"turn{side}" for side in ("Left", "Right")]
    tags += [f"thruMerge{side}" for side in ("Left", "Right")] + [f"no{side}Turn" for side in ("Left", "Right")]
    tags += ["addedLane", "dip", "doNotEnter", "doNotPass", "intersection", "keepRight", "laneEnds", "merge", "slow"]
    tags += ["pedestrianCrossing", "rightLaneMustTurn", "roundabout", "school", "signalAhead", "stop", "stopAhead"]
    tags += ["thruTrafficMergeLeft", "yield", "yieldAhead"]
    assert len(tags) == len(set(tags)) == 47
    rows = [
        "Filename;Annotation tag;Upper left corner X;Upper left corner Y;Lower right corner X;Lower right corner Y;"
        "Occluded,On another road;Origin file;Origin frame number;Origin track;Origin track frame number"
    ]
    for track in range(5):
        picture(tmp_path / f"{track}.png")
        rows += [f"{track}.png;{tag};1;2;11;22;0,0;clip.avi;7;{track};0" for tag in tags]
    write(tmp_path / "allAnnotations.csv", "\n".join(rows) + "\n")
    objects, faults = converted("uodb_lisa", tmp_path)["val"]
    assert faults == []
    labels = [entry[0] for entry in objects["4.png"]]
    counts = {name: labels.count(name) for name in CONVERSIONS["uodb_lisa"].classes}
    assert counts == {"warning": 17, "noturn": 2, "speedlimit": 10, "stop": 1}


def test_dota_is_cut_into_crops(tmp_path: Path) -> None:
    text = "imagesource:GoogleEarth\ngsd:0.15\n"
    text += "100.0 150.0 150.0 100.0 200.0 150.0 150.0 200.0 plane 0\n"  # in the first crop only
    text += "1000 10 1040 10 1040 30 1000 30 ship 0\n"  # 60 % in the first crop, whole in the second
    text += "830 50 860 50 860 60 830 60 harbor 1\n"  # difficult, in both
    text += "1 2 3 4 5 6 7 8 zeppelin 0\n1 2 3 4 5 6 7 8 plane\n1 2 3 4 5 6 7 x plane 0\n"
    text += "1300 10 1340 10 1340 30 1300 30 ship 0\n"
    write(tmp_path / "train/labelTxt/P0001.txt", text)
    picture(tmp_path / "train/images/P0001.png", 1200, 300)
    picture(tmp_path / "train/images/P0002.png", 1200, 300)  # nothing in it
    write(tmp_path / "train/labelTxt/P0002.txt", "imagesource:null\ngsd:null\n")
    write(tmp_path / "train/labelTxt/P0003.txt", "")
    picture(tmp_path / "val/images/P0004.png", 300, 1848)
    write(tmp_path / "val/labelTxt/P0004.txt", "10 1800 20 1800 20 1810 10 1810 bridge 0\n")
    found = converted("uodb_dota", tmp_path)
    objects, faults = found["train"]
    assert objects == {
        "train/P0001__0_0.jpg": [
            ("plane", 100, 100, 100, 100, False),
            ("ship", 1000, 10, 24, 20, True),
            ("harbor", 830, 50, 30, 10, True),
        ],
        "train/P0001__176_0.jpg": [
            ("plane", 0, 100, 24, 100, True),
            ("ship", 824, 10, 40, 20, False),
            ("harbor", 654, 50, 30, 10, True),
        ],
    }
    labels = tmp_path / "train" / "labelTxt"
    expected = [
        (f"{labels}/P0001.txt:6", "the class 'zeppelin' is unknown"),
        (f"{labels}/P0001.txt:7", "9 fields in place of 10"),
        (f"{labels}/P0001.txt:8", "no readable number"),
        (f"{labels}/P0001.txt:9", "lies outside its image of 1200 x 300"),
        (f"{labels}/P0003.txt", "P0003.png does not exist"),
    ]
    assert_faults(faults, expected)
    assert found["val"] == (
        {"val/P0004__0_0.jpg": [], "val/P0004__0_824.jpg": [("bridge", 10, 976, 10, 10, False)]},
        [],
    )
    assert len(DOTA_CLASSES) == 15


def test_a_truncated_image_that_has_to_be_cut_is_a_fault(tmp_path: Path) -> None:
    SOURCES["uodb_dota"].smoke(tmp_path)
    broken = tmp_path / "train" / "images" / "P0001.png"
    broken.write_bytes(broken.read_bytes()[:600])
    objects, faults = converted("uodb_dota", tmp_path)["train"]
    assert_faults(faults, [(str(broken), "cannot be read")])
    assert not any("P0001" in file for file in objects)


def lesion_row(name: str, box: str, noisy: object, split: object) -> str:
    return f'{name},1,1,1,109,"1, 2","{box}","1, 2",0.5,3,{noisy},"103, 115",0.8,"512, 512","-175, 275",F,62,{split}'


def test_deep_lesion(tmp_path: Path) -> None:
    columns = (
        "File_name,Patient_index,Study_index,Series_ID,Key_slice_index,Measurement_coordinates,Bounding_boxes,"
        "Lesion_diameters_Pixel_,Normalized_lesion_location,Coarse_lesion_type,Possibly_noisy,Slice_range,"
        "Spacing_mm_px_,Image_size,DICOM_windows,Patient_gender,Patient_age,Train_Val_Test"
    )
    rows = [
        lesion_row("000001_01_01_109.png", "10.5, 20, 30.25, 40", 0, 1),
        lesion_row("000001_01_01_109.png", "50, 50, 60, 60", 1, 1),
        lesion_row("000002_01_01_014.png", "1, 1, 9, 9", 0, 3),
        lesion_row("000002_01_01_014.png", "1, 1, 9, 9", 0, 2),
        lesion_row("000001_01_01_109.png", "1, 1, 9", 0, 1),
        lesion_row("000001_01_01_109.png", "1, 1, 9, 9", 0, 4),
        lesion_row("000001_01_01_109.png", "1, 90, 9, 99", 0, 1),
        lesion_row("000003_01_01_001.png", "1, 1, 9, 9", 0, 1),
        "000001_01_01_109.png,1",
    ]
    write(tmp_path / "DL_info.csv", "\n".join([columns, *rows]) + "\n")
    units = np.full((80, 100), -1024, np.int32)
    units[20:40, 10:30] = 3071
    units[50:60, 50:60] = 4000  # above the window
    for series, name in (("000001_01_01", "109"), ("000002_01_01", "014")):
        path = tmp_path / "Images_png" / series / f"{name}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray((units + 32768).astype(np.uint16)).save(path)
    found = converted("uodb_deeplesion", tmp_path)
    assert found["val"] == ({"val/000002_01_01_014.png": [("lesion", 1, 1, 8, 8, False)]}, [])
    objects, faults = found["train"]
    boxes = [("lesion", 10.5, 20, 19.75, 20, False), ("lesion", 50, 50, 10, 10, True)]
    assert objects == {"train/000001_01_01_109.png": boxes}
    source = tmp_path / "DL_info.csv"
    expected = [
        (f"{source}:10", "2 fields in place of 18"),
        (f"{source}:7", "Train_Val_Test is '4'"),
        (f"{source}:6", "no readable box"),
        (f"{source}:8", "lies outside its image"),
        (f"{source}:9", "001.png does not exist"),
    ]
    assert_faults(faults, expected)
    with Image.open(places("uodb_deeplesion", tmp_path)["train_images"] / "train/000001_01_01_109.png") as image:
        grey = np.array(image)
    assert grey.dtype == np.uint8
    assert (grey[0, 0], grey[30, 20], grey[55, 55]) == (0, 255, 255)
