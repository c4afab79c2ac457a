//! Ranks are played by sockets, because a verdict ends the process of a real one.

use super::*;

struct Player {
    reader: BufReader<TcpStream>,
    writer: TcpStream,
}

impl Player {
    fn join(port: u16, rank: usize, size: usize, build: &str) -> Self {
        let writer = connect(&format!("127.0.0.1:{port}"), rank).unwrap();
        writer.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let reader = BufReader::new(writer.try_clone().unwrap());
        let mut player = Self { reader, writer };
        player.say(&Said::Hello { rank, size, build: build.to_owned() });
        player
    }

    fn say(&mut self, said: &Said) {
        say(&mut self.writer, said).unwrap();
    }

    /// The next answer that is not about a beat.
    fn hear(&mut self) -> Answer {
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line).unwrap();
            match serde_json::from_str(&line).unwrap() {
                Answer::Pong => {}
                answer => return answer,
            }
        }
    }

    fn stop(&mut self) -> Stop {
        match self.hear() {
            Answer::Stop(stop) => stop,
            other => panic!("{other:?}"),
        }
    }

    fn beat(&mut self, begun: u64, waits_for: Option<&str>, ticks: u64) {
        let waits_for = waits_for.map(|name| (begun, name.to_owned()));
        self.say(&Said::Beat(Place { begun, name: "x".to_owned(), waits_for, phase: STEP.to_owned(), ticks }));
    }
}

fn meet(size: usize) -> Vec<Player> {
    let listener = listen(0).unwrap();
    let port = listener.local_addr().unwrap().port();
    server::start(listener, size, "b".to_owned(), vec![1, 2]);
    let mut players: Vec<Player> = (0..size).map(|rank| Player::join(port, rank, size, "b")).collect();
    for player in &mut players {
        assert!(matches!(player.hear(), Answer::Welcome { payload } if payload == [1, 2]));
    }
    players
}

#[test]
fn other_builds_and_counts_are_refused() {
    for (size, build, expected) in [(3, "b", "counts 3 ranks, rank 0 counts 2"), (2, "c", "another build")] {
        let listener = listen(0).unwrap();
        let port = listener.local_addr().unwrap().port();
        server::start(listener, 2, "b".to_owned(), vec![]);
        let mut first = Player::join(port, 0, 2, "b");
        // In this order, so that rank 0 has its seat.
        std::thread::sleep(Duration::from_millis(100));
        let _second = Player::join(port, 1, size, build);
        let stop = first.stop();
        assert!(stop.printer == 0 && stop.code == 2 && stop.cause.contains(expected), "{stop:?}");
    }
}

#[test]
fn ranks_agree_or_the_run_ends() {
    let mut players = meet(2);
    for value in ["same", "same"] {
        players.iter_mut().for_each(|player| player.say(&Said::Agree { what: "recipe".to_owned(), value: value.to_owned() }));
        players.iter_mut().for_each(|player| assert!(matches!(player.hear(), Answer::Agreed)));
    }
    players[0].say(&Said::Agree { what: "recipe".to_owned(), value: "a".to_owned() });
    players[1].say(&Said::Agree { what: "recipe".to_owned(), value: "b".to_owned() });
    let stop = players[1].stop();
    assert_eq!((stop.place.as_str(), stop.cause.as_str()), ("rank 1", "has another recipe than rank 0"));
}

#[test]
fn of_many_errors_one_is_told() {
    let mut players = meet(3);
    players[2].say(&Said::Failed { code: 2 });
    players[1].say(&Said::Failed { code: 101 });
    let stop = players[0].stop();
    assert_eq!((stop.printer, stop.code), (1, 101));
}

#[test]
fn a_rank_that_dies_is_named_with_the_collective_it_did_not_reach() {
    let mut players = meet(3);
    players[0].beat(5, Some("gradients from head on"), 9);
    players[2].beat(5, Some("gradients from head on"), 9);
    players[1].beat(4, None, 3);
    drop(players.remove(1));
    assert!(matches!(players[0].hear(), Answer::Report));
    let stop = players[0].stop();
    assert_eq!((stop.place.as_str(), stop.printer), ("rank 1", 0));
    assert_eq!(stop.cause, "ended without a word; it did not reach collective 5 (gradients from head on)");
}

#[test]
fn a_rank_that_hangs_or_is_silent_is_named() {
    // One run for both takes the time of the longer: rank 1 beats but does not move.
    let started = Instant::now();
    let mut players = meet(2);
    let mut silent = meet(2);
    let quiet = std::thread::spawn(move || {
        let (mut first, _second) = (silent.remove(0), silent.remove(0));
        while started.elapsed() < SILENCE + BEAT {
            first.beat(2, Some("loss"), 1);
            std::thread::sleep(BEAT);
        }
        first.stop()
    });
    while started.elapsed() < HANG + BEAT * 2 {
        players[0].beat(7, Some("loss"), 1);
        players[1].beat(6, None, 1);
        std::thread::sleep(BEAT);
    }
    let stop = players[0].stop();
    assert!(stop.place == "rank 1" && stop.cause.contains("has not moved") && stop.cause.contains("collective 7 (loss)"), "{stop:?}");
    assert!(started.elapsed() < Duration::from_secs(30));
    let stop = quiet.join().unwrap();
    assert!(stop.place == "rank 1" && stop.cause.contains("has not answered"), "{stop:?}");
}

#[test]
fn goodbyes_end_the_watch() {
    let mut players = meet(2);
    players.iter_mut().for_each(|player| player.say(&Said::Bye));
    let mut line = String::new();
    // The server hangs up.
    assert_eq!(players[0].reader.read_line(&mut line).unwrap(), 0);
}
