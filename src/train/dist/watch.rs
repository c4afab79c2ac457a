//! Who is alive and how far: a line of text per second from every rank to rank 0, beside the collectives and independent of them.
//!
//! A collective cannot tell why it does not end. Here every rank says which collective it has reached and whether its computation moves, so
//! that a rank that died, was stopped or hangs is named with the collective it did not reach, and all others end at once instead of
//! waiting for ever. The same connection compares builds and recipes and carries NCCL's id.

mod server;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Between two lines of one rank.
const BEAT: Duration = Duration::from_secs(1);
/// A process that is silent for so long is stopped, or its machine is gone.
const SILENCE: Duration = Duration::from_secs(12);
/// A rank whose computation does not move for so long, while another waits for it, hangs.
const HANG: Duration = Duration::from_secs(20);
/// How long ranks look for rank 0, and rank 0 for them.
const RENDEZVOUS: Duration = Duration::from_secs(45);

/// The phase in which a rank that does not move is taken to hang; in others (evaluating, saving) nobody knows how long it takes.
pub(super) const STEP: &str = "step";

/// How far a rank has come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Place {
    /// Collectives begun.
    begun: u64,
    /// The newest of them.
    name: String,
    /// The one it waits for, with its number.
    waits_for: Option<(u64, String)>,
    /// What it does; see [`STEP`].
    phase: String,
    /// Grows while it computes.
    ticks: u64,
}

/// From a rank to rank 0.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Hello { rank: usize, size: usize, build: String },
    Beat(Place),
    Agree { what: String, value: String },
    Failed { code: u8 },
    Bye,
}

/// From rank 0 to a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Welcome {
        payload: Vec<u8>,
    },
    Pong,
    /// Say at once how far you are: someone is gone.
    Report,
    Agreed,
    Stop(Stop),
}

/// The end of the run for every rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Stop {
    /// The rank that tells the user.
    printer: usize,
    place: String,
    cause: String,
    fix: String,
    code: u8,
}

/// This rank's end of the watch.
pub(super) struct Watch {
    rank: usize,
    shared: Arc<Shared>,
    stream: Mutex<TcpStream>,
    server: Mutex<Option<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Shared {
    place: Mutex<Place>,
    ticks: AtomicU64,
    /// This rank has an error of its own, or is done: its main thread decides what happens next.
    leaving: AtomicBool,
    heard: Mutex<Heard>,
    changed: Condvar,
}

#[derive(Default)]
struct Heard {
    agreed: u64,
    stop: Option<Stop>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A listener for the ranks, on `port` (0 for any).
pub(super) fn listen(port: u16) -> Result<TcpListener> {
    TcpListener::bind(("0.0.0.0", port)).map_err(|error| {
        Error::input(format!("MASTER_PORT {port}"), format!("rank 0 cannot listen there: {error}")).fix("choose a free port")
    })
}

impl Watch {
    /// Meets the other ranks at `address`. Rank 0 brings the `listener` and the `payload`, which every rank gets.
    ///
    /// # Errors
    /// When the address is not reached, ranks are missing, or one runs another build; one rank says so.
    pub(super) fn join(
        rank: usize,
        size: usize,
        address: &str,
        listener: Option<TcpListener>,
        payload: Vec<u8>,
    ) -> Result<(Self, Vec<u8>)> {
        let build = build_hash()?;
        let server = listener.map(|listener| server::start(listener, size, build.clone(), payload));
        let stream = connect(address, rank)?;
        stream.set_nodelay(true).and_then(|()| stream.set_read_timeout(Some(RENDEZVOUS + SILENCE))).map_err(unreachable(address))?;
        let mut reader = BufReader::new(stream.try_clone().map_err(unreachable(address))?);
        let mut writer = stream;
        say(&mut writer, &Said::Hello { rank, size, build }).map_err(unreachable(address))?;
        let mut line = vec![];
        let _ = reader.read_until(b'\n', &mut line);
        let payload = match serde_json::from_slice(&line) {
            Ok(Answer::Welcome { payload }) => payload,
            Ok(Answer::Stop(stop)) => leave(rank, &stop),
            _ => {
                let cause = "rank 0 did not answer: it ended, or something else listens there";
                return Err(
                    Error::input(format!("rendezvous {address}"), cause).fix("look at rank 0's message, or choose another MASTER_PORT")
                );
            }
        };
        let shared = Arc::new(Shared::default());
        reader.get_ref().set_read_timeout(Some(BEAT)).map_err(unreachable(address))?;
        let beats = writer.try_clone().map_err(unreachable(address))?;
        let heard = shared.clone();
        std::thread::Builder::new()
            .name("watch".into())
            .spawn(move || follow(rank, &heard, reader, beats))
            .map_err(Error::io("start a thread for", "the watch"))?;
        Ok((Self { rank, shared, stream: Mutex::new(writer), server: Mutex::new(server) }, payload))
    }

    /// A collective called `name` begins; its number.
    pub(super) fn begin(&self, name: &str) -> u64 {
        let mut place = lock(&self.shared.place);
        place.begun += 1;
        name.clone_into(&mut place.name);
        place.begun
    }

    /// This rank waits for collective `number`, or for none.
    pub(super) fn waits(&self, number: Option<(u64, &str)>) {
        lock(&self.shared.place).waits_for = number.map(|(number, name)| (number, name.to_owned()));
    }

    /// The computation moves.
    pub(super) fn tick(&self) {
        self.shared.ticks.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn phase(&self, phase: &str) {
        phase.clone_into(&mut lock(&self.shared.place).phase);
    }

    /// Returns when all ranks have said the same; otherwise the run ends with one message.
    pub(super) fn agree(&self, what: &str, value: &str) {
        let wanted = lock(&self.shared.heard).agreed + 1;
        let _ = say(&mut lock(&self.stream), &Said::Agree { what: what.to_owned(), value: value.to_owned() });
        let mut heard = lock(&self.shared.heard);
        while heard.agreed < wanted {
            heard = self.shared.changed.wait(heard).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    /// This rank ends with an error of its own. Whether it is the one to say so.
    pub(super) fn fail(&self, code: u8) -> bool {
        self.shared.leaving.store(true, Ordering::Relaxed);
        if say(&mut lock(&self.stream), &Said::Failed { code }).is_err() {
            return true;
        }
        let heard = lock(&self.shared.heard);
        let waited = self.shared.changed.wait_timeout_while(heard, SILENCE, |heard| heard.stop.is_none());
        let (heard, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        heard.stop.as_ref().is_none_or(|stop| stop.printer == self.rank)
    }

    /// The run is over and went well.
    pub(super) fn bye(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
        let _ = say(&mut lock(&self.stream), &Said::Bye);
        if let Some(server) = lock(&self.server).take() {
            let _ = server.join();
        }
    }
}

/// Ranks must run the same program: another build may order or round its sums in another way.
fn build_hash() -> Result<String> {
    let path = std::env::current_exe().map_err(Error::io("find", "this program"))?;
    let bytes = std::fs::read(&path).map_err(Error::io("read", &path))?;
    Ok(format!("{:016x}", xxhash_rust::xxh3::xxh3_64(&bytes)))
}

fn unreachable(address: &str) -> impl Fn(std::io::Error) -> Error + '_ {
    move |error| {
        Error::input(format!("rendezvous {address}"), format!("rank 0 is not reached: {error}"))
            .fix("set MASTER_ADDR and MASTER_PORT to an address of rank 0 that every machine can open")
    }
}

fn connect(address: &str, rank: usize) -> Result<TcpStream> {
    let deadline = Instant::now() + if rank == 0 { Duration::from_secs(5) } else { RENDEZVOUS };
    loop {
        let attempt = address.to_socket_addrs().and_then(|mut found| {
            let first = found.next().ok_or(std::io::ErrorKind::NotFound)?;
            TcpStream::connect_timeout(&first, Duration::from_secs(3))
        });
        match attempt {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > deadline => return Err(unreachable(address)(error)),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn say(stream: &mut TcpStream, what: &impl Serialize) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Sends a beat per second and hears what rank 0 answers, until the connection ends.
fn follow(rank: usize, shared: &Shared, mut reader: BufReader<TcpStream>, mut beats: TcpStream) {
    let (mut line, mut last_heard, mut last_said) = (vec![], Instant::now(), Instant::now() - BEAT);
    loop {
        if last_said.elapsed() >= BEAT {
            let place = Place { ticks: shared.ticks.load(Ordering::Relaxed), ..lock(&shared.place).clone() };
            let _ = say(&mut beats, &Said::Beat(place));
            last_said = Instant::now();
        }
        match reader.read_until(b'\n', &mut line) {
            Ok(0) => return lost(rank, shared, "ended"),
            Ok(_) => {
                last_heard = Instant::now();
                match serde_json::from_slice(&line) {
                    Ok(Answer::Report) => last_said = Instant::now() - BEAT,
                    Ok(answer) => hear(rank, shared, answer),
                    Err(_) => {}
                }
                line.clear();
            }
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                if last_heard.elapsed() > SILENCE {
                    return lost(rank, shared, "does not answer");
                }
            }
            Err(_) => return lost(rank, shared, "ended"),
        }
    }
}

fn hear(rank: usize, shared: &Shared, answer: Answer) {
    match answer {
        Answer::Agreed => lock(&shared.heard).agreed += 1,
        Answer::Stop(stop) => {
            if !shared.leaving.load(Ordering::Relaxed) {
                leave(rank, &stop);
            }
            lock(&shared.heard).stop = Some(stop);
        }
        Answer::Welcome { .. } | Answer::Pong | Answer::Report => return,
    }
    shared.changed.notify_all();
}

/// Rank 0, which judges the others, is gone itself.
fn lost(rank: usize, shared: &Shared, how: &str) {
    // A rank that has said goodbye, or is about to tell its own error, needs rank 0 no more.
    std::thread::sleep(Duration::from_millis(100));
    if shared.leaving.load(Ordering::Relaxed) {
        return;
    }
    let place = lock(&shared.place).clone();
    let (number, name) = place.waits_for.unwrap_or((place.begun + 1, "the next".to_owned()));
    let cause = format!("{how}; it did not reach collective {number} ({name})");
    leave(rank, &Stop { printer: rank, place: "rank 0".to_owned(), cause, fix: CONTINUE.to_owned(), code: 2 });
}

const CONTINUE: &str = "find out why that rank ended; the same command continues from the newest checkpoint";

/// Ends this process: its main thread may wait in a collective that will never end.
fn leave(rank: usize, stop: &Stop) -> ! {
    if stop.printer == rank {
        let mut message = format!("error: {}: {}\n", stop.place, stop.cause);
        if !stop.fix.is_empty() {
            message += &format!("  hint: {}\n", stop.fix);
        }
        let _ = std::io::stderr().write_all(message.as_bytes());
    }
    std::process::exit(i32::from(stop.code))
}

#[cfg(test)]
mod tests;
