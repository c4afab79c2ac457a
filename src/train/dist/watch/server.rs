//! Rank 0's side of the watch: collects what ranks say and decides when the run must end.

use super::{Answer, BEAT, CONTINUE, HANG, Place, RENDEZVOUS, SILENCE, STEP, Said, Stop, say};
use std::io::{BufRead, BufReader};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

/// A rank as rank 0 sees it.
struct Member {
    stream: TcpStream,
    place: Place,
    heard: Instant,
    moved: Instant,
    waits_since: Option<Instant>,
    gone: Option<Instant>,
    failed: Option<(Instant, u8)>,
    agreed: Option<(String, String)>,
    left: bool,
}

enum Event {
    Said(usize, Said),
    Gone(usize),
}

/// Serves `size` ranks on a thread of its own until all have said goodbye or the run is stopped.
pub(super) fn start(listener: TcpListener, size: usize, build: String, payload: Vec<u8>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (events, inbox) = channel();
        if let Some(members) = gather(&listener, size, &build, payload, &events) {
            Judge { members, settled: Instant::now() }.run(&inbox);
        }
    })
}

/// Waits for every rank's hello.
fn gather(listener: &TcpListener, size: usize, build: &str, payload: Vec<u8>, events: &Sender<Event>) -> Option<Vec<Member>> {
    let deadline = Instant::now() + RENDEZVOUS;
    let mut seats: Vec<Option<(TcpStream, BufReader<TcpStream>)>> = (0..size).map(|_| None).collect();
    let mut refusal = None;
    let _ = listener.set_nonblocking(true);
    while seats.iter().any(Option::is_none) && refusal.is_none() {
        match listener.accept() {
            Ok((stream, _)) => {
                if let Some((rank, its_size, its_build, reader)) = hello(&stream) {
                    refusal = refuse(rank, its_size, &its_build, size, build, rank < size && seats[rank].is_some());
                    if rank < size {
                        seats[rank] = Some((stream, reader));
                    }
                }
            }
            Err(_) if Instant::now() > deadline => {
                let missing = seats.iter().enumerate().filter(|(_, seat)| seat.is_none()).map(|(rank, _)| rank.to_string());
                let ranks = missing.collect::<Vec<_>>().join(", ");
                let cause = format!("rank {ranks} of {size} did not come within {} s", RENDEZVOUS.as_secs());
                refusal = Some((0, cause, "start every rank, with the same MASTER_ADDR and MASTER_PORT"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
    if let Some((_, cause, fix)) = refusal {
        let stop = Stop { printer: 0, place: "rendezvous".to_owned(), cause, fix: fix.to_owned(), code: 2 };
        // Rank 0 last: its process carries this thread.
        for (mut stream, _) in seats.into_iter().rev().flatten() {
            let _ = say(&mut stream, &Answer::Stop(stop.clone()));
        }
        return None;
    }
    let mut members = vec![];
    for (rank, (mut stream, reader)) in seats.into_iter().flatten().enumerate() {
        let _ = say(&mut stream, &Answer::Welcome { payload: payload.clone() });
        let events = events.clone();
        std::thread::spawn(move || listen(rank, reader, &events));
        members.push(Member::new(stream));
    }
    Some(members)
}

fn hello(stream: &TcpStream) -> Option<(usize, usize, String, BufReader<TcpStream>)> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(5))).ok()?;
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    std::io::Read::take(&mut reader, 4096).read_line(&mut line).ok()?;
    stream.set_read_timeout(None).ok()?;
    match serde_json::from_str(&line).ok()? {
        Said::Hello { rank, size, build } => Some((rank, size, build, reader)),
        _ => None,
    }
}

fn refuse(rank: usize, its_size: usize, its_build: &str, size: usize, build: &str, taken: bool) -> Option<(usize, String, &'static str)> {
    if its_size != size || rank >= size {
        return Some((rank, format!("rank {rank} counts {its_size} ranks, rank 0 counts {size}"), "start all ranks with one launcher"));
    }
    if taken {
        return Some((rank, format!("rank {rank} came twice"), "give every process its own rank"));
    }
    (its_build != build)
        .then(|| (rank, format!("rank {rank} runs another build of osprey than rank 0"), "start the same program on every machine"))
}

fn listen(rank: usize, mut reader: BufReader<TcpStream>, events: &Sender<Event>) {
    let mut line = String::new();
    while matches!(reader.read_line(&mut line), Ok(1..)) {
        if let Ok(said) = serde_json::from_str(&line)
            && events.send(Event::Said(rank, said)).is_err()
        {
            return;
        }
        line.clear();
    }
    let _ = events.send(Event::Gone(rank));
}

impl Member {
    fn new(stream: TcpStream) -> Self {
        let now = Instant::now();
        let place = Place::default();
        Self { stream, place, heard: now, moved: now, waits_since: None, gone: None, failed: None, agreed: None, left: false }
    }

    fn beat(&mut self, place: Place) {
        if place.ticks != self.place.ticks || place.begun != self.place.begun || place.phase != self.place.phase {
            self.moved = Instant::now();
        }
        let waited = self.place.waits_for.as_ref().map(|(number, _)| *number);
        let waits = place.waits_for.as_ref().map(|(number, _)| *number);
        if waits != waited {
            self.waits_since = waits.map(|_| Instant::now());
        }
        self.place = place;
    }

    fn is_here(&self) -> bool {
        !self.left && self.gone.is_none()
    }
}

struct Judge {
    members: Vec<Member>,
    /// Since when the run goes on.
    settled: Instant,
}

impl Judge {
    fn run(mut self, inbox: &Receiver<Event>) {
        loop {
            match inbox.recv_timeout(BEAT / 10) {
                Ok(Event::Said(rank, said)) => self.hear(rank, said),
                Ok(Event::Gone(rank)) if !self.members[rank].left => self.miss(rank),
                Ok(Event::Gone(_)) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return,
            }
            if let Some(stop) = self.verdict() {
                return self.stop(&stop);
            }
            if self.members.iter().all(|member| member.left) {
                let hang_up = |member: &Member| member.stream.shutdown(std::net::Shutdown::Both);
                self.members.iter().for_each(|member| drop(hang_up(member)));
                return;
            }
        }
    }

    fn hear(&mut self, rank: usize, said: Said) {
        let member = &mut self.members[rank];
        member.heard = Instant::now();
        match said {
            Said::Beat(place) => {
                member.beat(place);
                let _ = say(&mut member.stream, &Answer::Pong);
            }
            Said::Agree { what, value } => member.agreed = Some((what, value)),
            Said::Failed { code } => member.failed = Some((Instant::now(), code)),
            Said::Bye => member.left = true,
            Said::Hello { .. } => {}
        }
    }

    /// The launcher may be about to end the others as well: their last words are asked for at once.
    fn miss(&mut self, rank: usize) {
        self.members[rank].gone = Some(Instant::now());
        for member in self.members.iter_mut().filter(|member| member.is_here()) {
            let _ = say(&mut member.stream, &Answer::Report);
        }
    }

    /// Why the run must end, if it must.
    fn verdict(&mut self) -> Option<Stop> {
        self.failure().or_else(|| self.disagreement()).or_else(|| self.death()).or_else(|| self.silence()).or_else(|| self.hang())
    }

    /// Ranks that end with errors of their own. A moment passes first, because the same mistake is usually made by all.
    fn failure(&self) -> Option<Stop> {
        let failed = self.members.iter().enumerate().filter_map(|(rank, member)| member.failed.map(|(since, code)| (rank, since, code)));
        let (printer, _, code) = failed.clone().min_by_key(|(rank, ..)| *rank)?;
        let oldest = failed.map(|(_, since, _)| since).min()?;
        let complete = self.members.iter().all(|member| member.failed.is_some() || member.left);
        (complete || oldest.elapsed() > Duration::from_millis(500)).then(|| Stop {
            printer,
            place: format!("rank {printer}"),
            cause: "ended with an error".to_owned(),
            fix: String::new(),
            code,
        })
    }

    fn disagreement(&mut self) -> Option<Stop> {
        let first = self.members[0].agreed.clone()?;
        if self.members.iter().any(|member| member.agreed.is_none()) {
            return None;
        }
        let other = self.members.iter().position(|member| member.agreed.as_ref() != Some(&first));
        if let Some(rank) = other {
            let cause = format!("has another {} than rank 0", first.0);
            return Some(Stop {
                printer: 0,
                place: format!("rank {rank}"),
                cause,
                fix: "give every rank the same recipe, overrides and data".to_owned(),
                code: 2,
            });
        }
        for member in &mut self.members {
            member.agreed = None;
            let _ = say(&mut member.stream, &Answer::Agreed);
        }
        None
    }

    fn death(&self) -> Option<Stop> {
        let settled = |since: Instant| since.elapsed() > BEAT / 4;
        let rank = self.members.iter().position(|member| member.gone.is_some_and(settled))?;
        Some(self.blame(rank, "ended without a word"))
    }

    fn silence(&self) -> Option<Stop> {
        let silent = |member: &Member| member.is_here() && member.heard.elapsed() > SILENCE;
        let rank = self.members.iter().position(silent)?;
        Some(self.blame(rank, &format!("has not answered for {} s: it is stopped, or its machine is gone", SILENCE.as_secs())))
    }

    fn hang(&self) -> Option<Stop> {
        let (number, _) = self.awaited()?;
        let waited = self.members.iter().filter_map(|member| member.waits_since).any(|since| since.elapsed() > HANG);
        let hangs = |member: &Member| {
            member.is_here() && member.place.begun < number && member.place.phase == STEP && member.moved.elapsed() > HANG
        };
        let rank = self.members.iter().position(hangs).filter(|_| waited && self.settled.elapsed() > HANG)?;
        Some(self.blame(rank, &format!("has not moved for {} s", HANG.as_secs())))
    }

    /// The newest collective that a rank waits for.
    fn awaited(&self) -> Option<(u64, String)> {
        self.members.iter().filter_map(|member| member.place.waits_for.clone()).max_by_key(|(number, _)| *number)
    }

    fn blame(&self, rank: usize, how: &str) -> Stop {
        let begun = self.members[rank].place.begun;
        let (number, name) = self.awaited().filter(|(number, _)| *number > begun).unwrap_or((begun + 1, "the next".to_owned()));
        let cause = format!("{how}; it did not reach collective {number} ({name})");
        let printer = self.members.iter().enumerate().position(|(other, member)| other != rank && member.is_here()).unwrap_or(0);
        Stop { printer, place: format!("rank {rank}"), cause, fix: CONTINUE.to_owned(), code: 2 }
    }

    /// Tells everyone; rank 0 last, whose process carries this thread, and after the one that prints has had time to.
    fn stop(&mut self, stop: &Stop) {
        for (rank, member) in self.members.iter_mut().enumerate().rev() {
            if rank == 0 && stop.printer != 0 {
                std::thread::sleep(Duration::from_millis(300));
            }
            let _ = say(&mut member.stream, &Answer::Stop(stop.clone()));
        }
    }
}
