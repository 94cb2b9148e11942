//! What has been delivered, in the order in which it was read: the only place
//! where progress is decided.
//!
//! A source says two things, *an event* or *a position that is safe once
//! everything before it is delivered*, and both enter one queue in source order.
//! Deliveries come back in any order. When the head of the queue is a delivered
//! event it leaves; when the head is a position, everything before it has been
//! delivered, so it leaves too and may be confirmed. An event that was refused never
//! leaves, nor does anything behind it.
//!
//! ```text
//!   read order ──▶   E1 ✔   E2 ✔   P1   E3 …   E4 ✔   P2
//!                    └──── leave ───┘   └─ waits for E3 ─┘      confirmable: P1
//! ```
//!
//! Ordered acknowledgement, transaction boundaries (only a commit's end is a
//! position), idle progress (a keepalive's end is one too), bounded memory and a
//! graceful drain are this one mechanism. The queue knows nothing of Kafka or
//! Postgres.

use std::collections::VecDeque;

/// Events in flight and the positions between them, in source order.
///
/// `E` is what the caller wants back when an event is delivered, `P` a position.
#[derive(Debug)]
pub struct AckQueue<E, P> {
    entries: VecDeque<Entry<E, P>>,
    /// The sequence number of the first entry.
    head: u64,
    in_flight: Weight,
    held: Weight,
    /// Events added since the last position.
    behind: usize,
}

/// A number of events, and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weight {
    /// How many.
    pub events: usize,
    /// How large together.
    pub bytes: usize,
}

#[derive(Debug)]
enum Entry<E, P> {
    InFlight {
        event: E,
        bytes: usize,
    },
    Delivered {
        bytes: usize,
    },
    Refused,
    /// With how many events stand between it and the position before.
    Position(P, usize),
}

impl Weight {
    fn add(&mut self, bytes: usize) {
        self.events += 1;
        self.bytes += bytes;
    }

    fn remove(&mut self, bytes: usize) {
        self.events -= 1;
        self.bytes -= bytes;
    }
}

impl<E, P> Default for AckQueue<E, P> {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            head: 0,
            in_flight: Weight::default(),
            held: Weight::default(),
            behind: 0,
        }
    }
}

impl<E, P> AckQueue<E, P> {
    /// Adds an event that weighs `bytes` and returns its sequence number, by
    /// which its delivery is reported.
    pub fn push_event(&mut self, event: E, bytes: usize) -> u64 {
        let sequence = self.end();
        self.entries.push_back(Entry::InFlight { event, bytes });
        self.in_flight.add(bytes);
        self.held.add(bytes);
        self.behind += 1;
        sequence
    }

    /// Takes the event back that was added last: it was not sent after all.
    ///
    /// # Panics
    /// If the last entry is not an event in flight.
    pub fn withdraw(&mut self) -> E {
        let Some(Entry::InFlight { event, bytes }) = self.entries.pop_back() else {
            panic!("the last entry is not an event in flight");
        };
        self.in_flight.remove(bytes);
        self.held.remove(bytes);
        self.behind -= 1;
        event
    }

    /// Adds a position: safe to confirm once every event before it is delivered.
    ///
    /// Of neighbouring positions only the last is kept, so a server that pings a
    /// million times while the broker is away costs one entry.
    pub fn push_position(&mut self, position: P) {
        if let Some(Entry::Position(last, _)) = self.entries.back_mut() {
            *last = position;
        } else {
            let events = std::mem::take(&mut self.behind);
            self.entries.push_back(Entry::Position(position, events));
        }
    }

    /// Marks an event delivered and returns it.
    ///
    /// # Panics
    /// If `sequence` is not an event in flight: to go on would confirm something
    /// that was never delivered.
    pub fn delivered(&mut self, sequence: u64) -> E {
        self.settle(sequence, |bytes| Entry::Delivered { bytes })
    }

    /// Marks an event that will not be delivered and returns it: it is no longer in
    /// flight, and nothing behind it will ever be confirmable.
    ///
    /// # Panics
    /// As [`delivered`](Self::delivered).
    pub fn refused(&mut self, sequence: u64) -> E {
        self.settle(sequence, |_| Entry::Refused)
    }

    fn settle(&mut self, sequence: u64, settled: fn(usize) -> Entry<E, P>) -> E {
        let entry = sequence
            .checked_sub(self.head)
            .and_then(|index| self.entries.get_mut(usize::try_from(index).ok()?));
        let Some(entry @ &mut Entry::InFlight { bytes, .. }) = entry else {
            panic!("delivery report {sequence} names no event in flight");
        };
        self.in_flight.remove(bytes);
        match std::mem::replace(entry, settled(bytes)) {
            Entry::InFlight { event, .. } => event,
            _ => unreachable!("it was just seen in flight"),
        }
    }

    /// Removes what is delivered from the head and returns the newest position
    /// that everything before is delivered of, if a new one was reached, with the
    /// number of events since the last that was returned.
    pub fn confirmable(&mut self) -> Option<(P, usize)> {
        let mut reached = None;
        let mut events = 0;
        while let Some(entry) = self.entries.front() {
            if matches!(entry, Entry::InFlight { .. } | Entry::Refused) {
                break;
            }
            match self.entries.pop_front() {
                Some(Entry::Position(position, before)) => {
                    events += before;
                    reached = Some(position);
                }
                Some(Entry::Delivered { bytes }) => self.held.remove(bytes),
                _ => unreachable!("the head was just seen"),
            }
            self.head += 1;
        }
        reached.map(|position| (position, events))
    }

    /// How many entries have left: it rises with progress, and only with it.
    pub fn head(&self) -> u64 {
        self.head
    }

    /// How many entries have been added.
    pub fn end(&self) -> u64 {
        self.head + self.entries.len() as u64
    }

    /// The event in flight with this sequence number.
    pub fn get(&self, sequence: u64) -> Option<&E> {
        let index = usize::try_from(sequence.checked_sub(self.head)?).ok()?;
        match self.entries.get(index)? {
            Entry::InFlight { event, .. } => Some(event),
            _ => None,
        }
    }

    /// The events not yet delivered.
    pub fn in_flight(&self) -> Weight {
        self.in_flight
    }

    /// The events not yet delivered, and those behind the first of them: what
    /// memory holds, and what a crash would repeat. One event that is stuck keeps
    /// all that follow it.
    pub fn held(&self) -> Weight {
        self.held
    }

    /// Whether everything was delivered and every position handed out.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_position_waits_for_every_event_before_it() {
        let mut queue = AckQueue::default();
        let first = queue.push_event("a", 1);
        let second = queue.push_event("b", 1);
        queue.push_position(10);
        queue.delivered(second);
        assert_eq!(queue.confirmable(), None);
        queue.delivered(first);
        assert_eq!(queue.confirmable(), Some((10, 2)));
        assert_eq!(queue.confirmable(), None);
    }

    #[test]
    fn an_event_that_was_withdrawn_was_never_there() {
        let mut queue = AckQueue::default();
        let first = queue.push_event("a", 1);
        queue.push_event("b", 7);
        assert_eq!(queue.withdraw(), "b");
        queue.push_position(10);
        queue.delivered(first);
        assert_eq!(queue.confirmable(), Some((10, 1)));
        assert_eq!(queue.held(), Weight::default());
        assert_eq!(queue.in_flight(), Weight::default());
    }

    #[test]
    fn neighbouring_positions_are_one_entry() {
        let mut queue = AckQueue::<(), _>::default();
        let event = queue.push_event((), 1);
        for position in 0..1_000_000 {
            queue.push_position(position);
        }
        assert_eq!(queue.entries.len(), 2);
        queue.delivered(event);
        assert_eq!(queue.confirmable(), Some((999_999, 1)));
    }

    #[test]
    fn one_stuck_event_holds_all_that_were_delivered_behind_it() {
        let mut queue = AckQueue::<_, ()>::default();
        let stuck = queue.push_event("stuck", 10);
        for _ in 0..100 {
            let event = queue.push_event("delivered", 10);
            queue.delivered(event);
        }
        queue.confirmable();
        assert_eq!(queue.in_flight().events, 1);
        assert_eq!((queue.held().events, queue.held().bytes), (101, 1010));
        queue.delivered(stuck);
        queue.confirmable();
        assert_eq!(queue.held(), Weight::default());
    }

    #[test]
    fn a_position_counts_its_events_though_they_left_before_it_came() {
        let mut queue = AckQueue::default();
        queue.push_position(10);
        let event = queue.push_event((), 1);
        queue.delivered(event);
        assert_eq!(queue.confirmable(), Some((10, 0)));
        queue.push_position(20);
        queue.push_position(30);
        assert_eq!(queue.confirmable(), Some((30, 1)));
    }

    #[test]
    fn nothing_behind_a_refused_event_is_ever_confirmable() {
        let mut queue = AckQueue::default();
        let refused = queue.push_event("refused", 1);
        let delivered = queue.push_event("delivered", 1);
        queue.push_position(10);
        queue.delivered(delivered);
        assert_eq!(queue.refused(refused), "refused");
        assert_eq!(queue.in_flight().events, 0);
        assert_eq!(queue.confirmable(), None);
        assert!(!queue.is_empty());
    }

    #[test]
    #[should_panic(expected = "names no event in flight")]
    fn a_second_report_of_one_delivery_is_a_defect() {
        let mut queue = AckQueue::<(), ()>::default();
        let first = queue.push_event((), 1);
        queue.push_event((), 1);
        queue.delivered(first);
        queue.delivered(first);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Event(usize),
        Position,
        Deliver(prop::sample::Index),
        Confirm,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0usize..1000).prop_map(Step::Event),
            2 => Just(Step::Position),
            4 => any::<prop::sample::Index>().prop_map(Step::Deliver),
            2 => Just(Step::Confirm),
        ]
    }

    proptest! {
        /// Against a model that keeps everything: a position is handed out
        /// exactly when nothing before it is in flight, in order, none skipped.
        #[test]
        fn agrees_with_a_model_that_forgets_nothing(steps in prop::collection::vec(step(), 0..400)) {
            let mut queue = AckQueue::default();
            // (delivered, bytes, sequence) for an event, the index for a position.
            let mut model: Vec<Result<(bool, usize, u64), usize>> = Vec::new();
            let mut confirmed = 0;
            for step in steps {
                match step {
                    Step::Event(bytes) => {
                        let sequence = queue.push_event(model.len(), bytes);
                        model.push(Ok((false, bytes, sequence)));
                    }
                    Step::Position => {
                        queue.push_position(model.len());
                        model.push(Err(model.len()));
                    }
                    Step::Deliver(index) => {
                        let open: Vec<usize> = (0..model.len())
                            .filter(|&i| matches!(model[i], Ok((false, ..))))
                            .collect();
                        if open.is_empty() { continue; }
                        let chosen = *index.get(&open);
                        let Ok((delivered, _, sequence)) = &mut model[chosen] else { unreachable!() };
                        *delivered = true;
                        prop_assert_eq!(queue.get(*sequence), Some(&chosen));
                        prop_assert_eq!(queue.delivered(*sequence), chosen);
                    }
                    Step::Confirm => {
                        let safe = model.iter().take_while(|e| !matches!(e, Ok((false, ..)))).count();
                        let expected = model[..safe].iter().filter_map(|e| e.err()).next_back()
                            .filter(|&p| p >= confirmed);
                        prop_assert_eq!(queue.confirmable().map(|(position, _)| position), expected);
                        confirmed = expected.map_or(confirmed, |p| p + 1);
                    }
                }
                let open = model.iter().filter_map(|e| e.ok()).filter(|e| !e.0);
                prop_assert_eq!(queue.in_flight().events, open.clone().count());
                prop_assert_eq!(queue.in_flight().bytes, open.map(|e| e.1).sum::<usize>());
                prop_assert!(queue.held().events <= model.len());
            }
        }
    }
}
