//! The CUDA kernels compiled by the system's C++ compiler and run on the CPU, for tests.
//!
//! Every launch runs under several thread orders and must leave the same bytes behind each time. The header that makes this possible,
//! `kernels/emulate/`, also checks shared memory for races and bounds, and barriers for divergence.

mod compile;
mod memory;
mod signature;
#[cfg(test)]
mod tests;

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::device::{Arg, Device, Place, defect, within};
use crate::error::Result;
use compile::Kernels;
pub(crate) use memory::Memory;
use signature::Parameter;

/// In which order threads run that may run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Order {
    Forward = 0,
    Reverse = 1,
    /// A permutation drawn anew between barriers.
    Random = 2,
}

/// Dynamic and static shared memory that a block may have on every supported architecture (163 KiB, that of sm_80).
const SHARED_LIMIT: u32 = 163 * 1024;

/// What `emulate::Request` is in C++.
#[repr(C)]
struct Request {
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    shared_limit: u32,
    order: Order,
    seed: u64,
    args: *mut *mut c_void,
}

type Run = unsafe extern "C" fn(*const Request, *mut c_char, usize) -> c_int;

/// A device on the CPU.
pub(crate) struct Emulated {
    id: u64,
    kernels: &'static Kernels,
    orders: Vec<Order>,
    launches: AtomicU64,
    /// Held while memory of the device is read or written.
    busy: Mutex<()>,
}

/// The folder of all kernels and their headers.
fn repository_kernels() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels")
}

impl Emulated {
    /// A device with the kernels of the repository; every launch runs in all three orders and must give the same. Under sanitizers, which
    /// look at memory and not at results, one order is enough. None, after a message, where there is no C++ compiler.
    pub(crate) fn new() -> Option<Self> {
        let device = Self::with_folder(&repository_kernels())?;
        Some(if compile::is_sanitized() { device.in_order(Order::Random) } else { device })
    }

    /// The same with the kernels of another folder.
    pub(crate) fn with_folder(folder: &Path) -> Option<Self> {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let kernels = compile::kernels(folder)?;
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        let orders = vec![Order::Forward, Order::Reverse, Order::Random];
        Some(Self { id, kernels, orders, launches: AtomicU64::new(0), busy: Mutex::new(()) })
    }

    /// Runs launches in `order` only: three times as fast, for whole models.
    pub(crate) fn in_order(mut self, order: Order) -> Self {
        self.orders = vec![order];
        self
    }

    fn own<'a>(&self, memory: &'a Memory) -> Result<&'a Memory> {
        if memory.device == self.id { Ok(memory) } else { Err(defect("memory of another device")) }
    }

    /// Runs in each order from the same memory, and compares what each leaves behind.
    fn run_orders(&self, run: Run, request: &mut Request, written: &[&Memory]) -> Result<(), String> {
        let mut first: Option<Vec<Vec<u8>>> = None;
        let before: Vec<Vec<u8>> =
            if self.orders.len() > 1 { written.iter().map(|memory| memory.contents()).collect() } else { Vec::new() };
        for (at, &order) in self.orders.iter().enumerate() {
            if at > 0 {
                written.iter().zip(&before).for_each(|(memory, bytes)| memory.set_contents(bytes));
            }
            request.order = order;
            run_once(run, request)?;
            if self.orders.len() == 1 {
                break;
            }
            let after: Vec<Vec<u8>> = written.iter().map(|memory| memory.contents()).collect();
            match &first {
                None => first = Some(after),
                Some(first) => compare(first, &after, self.orders[0], order)?,
            }
        }
        Ok(())
    }
}

/// One run; the message of the emulation when it fails.
fn run_once(run: Run, request: &Request) -> Result<(), String> {
    let mut message = [0u8; 2048];
    // SAFETY: `request` is laid out as the emulation expects, its arguments fit the kernel's parameters (checked by the caller), and the
    // message ends in a zero within its capacity.
    let failed = unsafe { run(request, message.as_mut_ptr().cast(), message.len()) };
    if failed == 0 {
        return Ok(());
    }
    let text = CStr::from_bytes_until_nul(&message).map(|text| text.to_string_lossy().into_owned());
    Err(text.unwrap_or_else(|_| "failed".to_owned()))
}

fn compare(first: &[Vec<u8>], second: &[Vec<u8>], one: Order, other: Order) -> Result<(), String> {
    for (buffer, (a, b)) in first.iter().zip(second).enumerate() {
        if let Some(at) = a.iter().zip(b).position(|(a, b)| a != b) {
            return Err(format!(
                "the results of thread orders {one:?} and {other:?} differ, first at byte {at} of written buffer {buffer}"
            ));
        }
    }
    Ok(())
}

impl Device for Emulated {
    type Memory = Memory;

    fn describe(&self) -> String {
        "kernels emulated on the CPU".to_owned()
    }

    /// Few, so that work is split and shared unevenly.
    fn multiprocessors(&self) -> u32 {
        3
    }

    fn resident_blocks(&self, _: &str, _: u32, _: u32) -> Result<u32> {
        Ok(3 * self.multiprocessors())
    }

    fn room(&self) -> Result<(usize, usize)> {
        Ok((usize::MAX, usize::MAX))
    }

    fn allocate(&self, bytes: usize, _: Place) -> Result<Memory> {
        Memory::new(self.id, bytes, self.kernels.sanitizer())
    }

    fn write_bytes(&self, to: &Memory, at: usize, from: &[u8]) -> Result<()> {
        within(self.own(to)?.len(), at, from.len())?;
        let _busy = self.busy.lock().expect("no launch panics");
        // SAFETY: the range lies within the allocation, and `busy` keeps others from it.
        unsafe { to.pointer().add(at).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn read_bytes(&self, from: &Memory, at: usize, to: &mut [u8]) -> Result<()> {
        within(self.own(from)?.len(), at, to.len())?;
        let _busy = self.busy.lock().expect("no launch panics");
        // SAFETY: as above.
        unsafe { from.pointer().add(at).copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    fn copy_bytes(&self, from: &Memory, from_at: usize, to: &Memory, to_at: usize, bytes: usize) -> Result<()> {
        within(self.own(from)?.len(), from_at, bytes)?;
        within(self.own(to)?.len(), to_at, bytes)?;
        if from.pointer() == to.pointer() && from_at < to_at + bytes && to_at < from_at + bytes {
            return Err(defect("a copy within one device buffer overlaps itself"));
        }
        let _busy = self.busy.lock().expect("no launch panics");
        // SAFETY: both ranges lie within their allocations and do not overlap.
        unsafe { to.pointer().add(to_at).copy_from_nonoverlapping(from.pointer().add(from_at), bytes) };
        Ok(())
    }

    fn fill_bytes(&self, to: &Memory, at: usize, bytes: usize, value: u8) -> Result<()> {
        within(self.own(to)?.len(), at, bytes)?;
        let _busy = self.busy.lock().expect("no launch panics");
        // SAFETY: the range lies within the allocation.
        unsafe { to.pointer().add(at).write_bytes(value, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: &str, grid: [u32; 3], block: [u32; 3], shared_bytes: u32, args: &[Arg<'_, Self>]) -> Result<()> {
        let fail = |cause: String| {
            let shape = format!("grid {grid:?}, block {block:?}, {shared_bytes} shared bytes");
            defect(format!("kernel {kernel} ({shape}): {cause}"))
        };
        check_shape(grid, block, shared_bytes).map_err(fail)?;
        let (parameters, run) = self.kernels.find(kernel).map_err(fail)?;
        let (mut values, written) = self.unpack(&parameters, args).map_err(fail)?;
        if grid.contains(&0) {
            return Ok(());
        }
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(|value| std::ptr::from_mut(value).cast()).collect();
        let seed = self.launches.fetch_add(1, Ordering::Relaxed);
        let args = pointers.as_mut_ptr();
        let mut request = Request { grid, block, shared_bytes, shared_limit: SHARED_LIMIT, order: Order::Forward, seed, args };
        let _busy = self.busy.lock().expect("no launch panics");
        self.run_orders(run, &mut request, &written).map_err(fail)?;
        written.iter().try_for_each(|memory| memory.check_surroundings()).map_err(fail)
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

impl Emulated {
    /// The value of each argument as 8 bytes, and the memory that the kernel may write.
    fn unpack<'a>(&self, parameters: &[Parameter], args: &'a [Arg<'_, Self>]) -> Result<(Vec<u64>, Vec<&'a Memory>), String> {
        if parameters.len() != args.len() {
            return Err(format!("{} arguments for {} parameters", args.len(), parameters.len()));
        }
        let mut values = Vec::with_capacity(args.len());
        let mut written: Vec<&Memory> = Vec::new();
        for (at, (parameter, arg)) in parameters.iter().zip(args).enumerate() {
            values.push(self.value(parameter, arg).map_err(|cause| format!("argument {at} {cause}"))?);
            if let (Parameter::Pointer { written: true, .. }, Arg::Memory { memory, .. }) = (parameter, arg)
                && !written.iter().any(|known| known.pointer() == memory.pointer())
            {
                written.push(memory);
            }
        }
        Ok((values, written))
    }

    fn value(&self, parameter: &Parameter, arg: &Arg<'_, Self>) -> Result<u64, String> {
        match (parameter, arg) {
            (Parameter::Unsigned32, Arg::U32(value)) => Ok(u64::from(*value)),
            (Parameter::Signed32, Arg::I32(value)) => Ok(u64::from(value.cast_unsigned())),
            (Parameter::Unsigned64, Arg::U64(value)) => Ok(*value),
            (Parameter::Float32, Arg::F32(value)) => Ok(u64::from(value.to_bits())),
            (Parameter::Pointer { .. }, Arg::Null) => Ok(0),
            (Parameter::Pointer { size, alignment, .. }, Arg::Memory { memory, at, element }) => {
                self.own(memory).map_err(|error| error.to_string())?;
                if *element != 1 && element != size {
                    return Err(format!("has elements of {element} bytes where the kernel takes {size}"));
                }
                if *at > memory.len() || at % alignment != 0 {
                    return Err(format!("starts at byte {at} of {}, which must be within and a multiple of {alignment}", memory.len()));
                }
                Ok(memory.pointer() as u64 + *at as u64)
            }
            (parameter, _) => Err(format!("is of another kind than {parameter:?}")),
        }
    }
}

/// The limits of every GPU.
fn check_shape(grid: [u32; 3], block: [u32; 3], shared_bytes: u32) -> Result<(), String> {
    let threads = block.iter().map(|&size| u64::from(size)).product::<u64>();
    if threads == 0 || threads > 1024 || block[2] > 64 {
        return Err("a block has 1 to 1024 threads, at most 64 along its third side".to_owned());
    }
    if grid[0] > i32::MAX.cast_unsigned() || grid[1] > 65535 || grid[2] > 65535 {
        return Err("a grid has at most 2147483647 by 65535 by 65535 blocks".to_owned());
    }
    if shared_bytes > SHARED_LIMIT {
        return Err(format!("a block has at most {SHARED_LIMIT} bytes of shared memory"));
    }
    Ok(())
}
