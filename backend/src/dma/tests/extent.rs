//! Windows that are very large, and very many.

use super::*;

#[test]
fn a_window_of_8_tib_is_usable_at_both_ends() {
    const SIZE: u64 = 8 << 40;
    let sparse = memfd_create("8-tib", MemfdFlags::CLOEXEC).unwrap();
    if let Err(errno) = ftruncate(&sparse, SIZE) {
        println!("skipped: no file of 8 TiB here: {errno}");
        return;
    }
    let theirs = File::from(sparse.try_clone().unwrap());
    let mut table = DmaTable::new(10);
    match table.map(Iova(0x1000), SIZE, READ_WRITE, Some((sparse, 0))) {
        Err(DmaError::Backing(Errno::NOMEM)) => {
            println!("skipped: no 8 TiB of address space (RLIMIT_AS, vm.overcommit_memory)");
            return;
        }
        outcome => outcome.unwrap(),
    }
    assert_eq!(table.start_logging(&[], 4096), Ok(4096));
    table.write(Iova(0x1000), b"first").unwrap();
    table.write(Iova(SIZE + 0x1000 - 4), b"last").unwrap();
    assert_eq!(
        table.write(Iova(SIZE + 0x1000 - 4), b"beyond"),
        Err(DmaError::Unmapped(SIZE + 0x1000))
    );
    assert_eq!(bytes_at(&theirs, 0, 5), b"first");
    assert_eq!(bytes_at(&theirs, SIZE - 4, 4), b"beyo");
    let mut bitmap = [0; 8];
    table.report(Iova(SIZE - 0x2000), 0x3000, 4096, &mut bitmap).unwrap();
    assert_eq!(bitmap, [0b100, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn as_many_windows_as_announced_fit_without_files() {
    const MOST: usize = 65535;
    let mut table = DmaTable::new(MOST);
    for page in 0..MOST as u64 {
        table.map(Iova(page << 13), 0x1000, READ_WRITE, None).unwrap();
    }
    let error = table.map(Iova(0x1000), 0x1000, READ_WRITE, None).unwrap_err();
    assert_eq!((error.errno(), error), (Errno::NOSPC, DmaError::TooMany));
    table.unmap(Iova(0), 0x1000).unwrap();
    table.map(Iova(0x1000), 0x1000, READ_WRITE, None).unwrap();
    table.unmap(Iova(0), u64::MAX).unwrap();
    assert_eq!(table.unmap(Iova(0), u64::MAX), Err(DmaError::NoSuchWindow));
}
