//! A disk that fails, and what is known of it afterwards. One test: fail points are the process's.

#![cfg(debug_assertions)]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ax_disk::{Condition, Image, Replica};
use ax_failpoint::{Action, Order, Point, arm};
use ax_wire::records::{FLUSH_AWAITED, Record, RecordKind, push};
use ax_wire::{EpochId, Generation, PairId};

const SIZE: u64 = 4 << 20;

fn open(dir: &Path) -> Image {
    let path = dir.join("image");
    if !path.exists() {
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    }
    Image::open(&path, &dir.join("meta"), PairId([1; 16]), SIZE, false).unwrap()
}

fn fails(point: Point) -> Order {
    Order::new(point, Action::Fail)
}

/// An epoch's records: a write, and a FLUSH that the primary waits for.
fn epoch() -> Vec<u8> {
    let mut records = Vec::with_capacity(4096);
    let record = |kind, at, payload| Record {
        kind,
        unit: 0,
        at,
        payload,
    };
    assert!(push(
        &mut records,
        record(RecordKind::DiskWrite, 0, &[5; 512])
    ));
    let flush = record(RecordKind::DiskFlush, FLUSH_AWAITED, &[][..]);
    assert!(push(&mut records, flush));
    records
}

#[test]
fn a_disk_that_failed_is_believed_again_only_as_far_as_it_can_be() {
    let dir = tempfile::tempdir().unwrap();
    let image = open(dir.path());
    image.write(0, &[1; 4096]).unwrap();
    image.flush().unwrap();

    // What failed may be tried again, and says how it failed.
    let mut sector = [0; 512];
    arm(&[fails(Point::ImageRead), fails(Point::ImageFull)]);
    assert_eq!(
        image.read(0, &mut sector).unwrap_err().raw_os_error(),
        Some(5)
    );
    image.read(0, &mut sector).unwrap();
    let full = image.write(512, &[2; 512]).unwrap_err();
    assert_eq!(full.kind(), ErrorKind::StorageFull);
    image.write(512, &[2; 512]).unwrap();
    image.flush().unwrap();

    // Not a flush: the kernel would call it durable the second time, whatever was lost.
    arm(&[fails(Point::ImageSync)]);
    assert!(image.flush().is_err());
    assert!(image.is_doubtful());
    let again = image.flush().unwrap_err();
    assert!(again.to_string().contains("not known"), "{again}");
    assert!(image.make_durable(Generation(3)).is_err());
    drop(image);

    // A disk that does not work takes no copy: nothing is overwritten, and it is not started from.
    let image = Arc::new(open(dir.path()));
    let replica = Replica::new(vec![Arc::clone(&image)], 2).unwrap();
    for point in [Point::ImageRead, Point::ImageWrite, Point::ImageFull] {
        arm(&[fails(point)]);
        assert!(replica.begin_sync().is_err(), "{point}");
        assert_eq!(image.meta().lock().condition(), Condition::Inconsistent);
    }
    assert!(!replica.has_failed());
    replica.begin_sync().unwrap();
    replica.mark_in_sync(Generation(4)).unwrap();
    assert_eq!(image.meta().lock().condition(), Condition::Consistent);

    // One that does not answer is known by how long it has been asked.
    assert_eq!(image.busy().awaited, Duration::ZERO);
    arm(&[Order::new(
        Point::ImageSync,
        Action::Hold(Duration::from_secs(60)),
    )]);
    replica.committed(EpochId(1), &mut epoch()).unwrap();
    while image.busy().awaited < Duration::from_millis(100) {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(replica.progress().1, EpochId(0));
    arm(&[]);
    replica.settle().unwrap();
    assert_eq!(replica.progress().1, EpochId(1));

    // And one that fails on the shadow is never promoted.
    arm(&[fails(Point::ImageFull)]);
    replica.committed(EpochId(2), &mut epoch()).unwrap();
    let error = replica.promote(Generation(5)).unwrap_err();
    assert!(error.to_string().contains("No space left"), "{error}");
    assert!(replica.has_failed());

    // An image that was removed, or replaced, is noticed.
    assert!(image.is_in_place().unwrap());
    std::fs::rename(dir.path().join("image"), dir.path().join("away")).unwrap();
    assert!(!image.is_in_place().unwrap());
    std::fs::write(dir.path().join("image"), b"another").unwrap();
    assert!(!image.is_in_place().unwrap());
}
