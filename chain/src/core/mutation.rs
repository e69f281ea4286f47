//! Bugs planted on purpose, one at a time, to see that the simulator finds them. Outside the tests none ever is, and the
//! compiler leaves the question out.

/// A bug.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// Acknowledgements leave out the generation farthest down.
    DropLastGeneration,
    /// Acknowledgements speak of the child alone.
    DropDescendants,
    /// A chunk is kept for the children only, not for those below them.
    KeepForChildrenOnly,
    /// A member of the family that has not reported is left out instead of counted as holding nothing.
    UnreportedCountsAsDone,
    /// The local consumer is not waited for.
    ForgetConsumer,
    /// A child is resumed one chunk late.
    ResumeOneLate,
    /// A child is resumed one chunk early.
    ResumeOneEarly,
    /// A child whose chunk has left is resumed from the oldest one there is.
    ResumeFromOldest,
    /// Orders are obeyed whatever their epoch.
    IgnoreEpoch,
    /// An order that replaces the link to the parent does not close the old one.
    KeepOldParent,
    /// An order that replaces a child's link does not close the old one.
    KeepOldChild,
    /// Orphans go to the one that fed the dead node when the wave began, even when that is dead, too.
    AttachToDead,
    /// The families of those above a dead node are not told.
    StaleFamilies,
    /// The death of a node does not move its children.
    ForgetOrphans,
    /// The wave is released when the first node holds the end.
    ReleaseEarly,
    /// The wave waits for the dead.
    WaitForDead,
    /// A planned removal waits for the links of those who hold everything. Random schedules meet it too seldom: it has a test
    /// of its own.
    WaitForEnded,
    /// A lost link with both ends alive is not dialled again.
    NoRedial,
    /// What the ancestor lacks is not fetched from the server.
    NoHistory,
    /// The server's history goes as soon as an orphan needs it.
    HistoryForgets,
    /// An orphan that caught up stays with the server.
    StayWithServer,
    /// Silence of a node is never noticed.
    NeverDead,
    /// A pause of the server counts as silence of the nodes.
    PauseKills,
    /// A full child counts as a dead link.
    FullIsDead,
    /// A silent link is never noticed.
    SilentLinkStays,
    /// A node whose disk is stuck is never noticed.
    NeverStuck,
    /// A word that was under way when a link was lost counts as a sign of life of a dead parent.
    JudgeAtOnce,
    /// What the history lacks is not asked for of those above the ancestor.
    HistoryOnly,
    /// A child that holds all that it was sent may be silent for ever.
    OnlyChunksCount,
    /// A chunk more than may go leaves the window.
    LetGoOneMore,
    /// A lost link counts against the one that replaced it.
    AnyLinkLost,
    /// A node whose consumer gave up keeps nothing for those below it.
    FailedIsDead,
    /// A child is resumed where its new parent is, when it is ahead of it.
    ResumeAtEnd,
    /// The dead stay in the families of those above them.
    DeadStayInFamilies,
    /// A link that is lost twice is dialled again and again.
    RedialForEver,
    /// The ancestor of an orphan that is being brought up does not keep its oldest chunk for it.
    AncestorForgets,
    /// The first dead link takes both its ends out.
    OneDeadLinkIsEnough,
    /// A disk that takes something now and then counts as stuck.
    SlowIsStuck,
    /// A node that is to leave goes before its children have another parent.
    RemoveAtOnce,
    /// A node that gave a damaged copy twice is taken out before anybody has seen a good one.
    BlameAtOnce,
    /// The node that was given damaged copies is taken out in place of the one that gave them.
    BlameTheWitness,
}

/// All of them.
#[cfg(test)]
pub const ALL: [Mutation; 40] = [
    Mutation::DropLastGeneration,
    Mutation::DropDescendants,
    Mutation::KeepForChildrenOnly,
    Mutation::UnreportedCountsAsDone,
    Mutation::ForgetConsumer,
    Mutation::ResumeOneLate,
    Mutation::ResumeOneEarly,
    Mutation::ResumeFromOldest,
    Mutation::IgnoreEpoch,
    Mutation::KeepOldParent,
    Mutation::KeepOldChild,
    Mutation::AttachToDead,
    Mutation::StaleFamilies,
    Mutation::ForgetOrphans,
    Mutation::ReleaseEarly,
    Mutation::WaitForDead,
    Mutation::NoRedial,
    Mutation::NoHistory,
    Mutation::HistoryForgets,
    Mutation::StayWithServer,
    Mutation::NeverDead,
    Mutation::PauseKills,
    Mutation::FullIsDead,
    Mutation::SilentLinkStays,
    Mutation::NeverStuck,
    Mutation::JudgeAtOnce,
    Mutation::HistoryOnly,
    Mutation::OnlyChunksCount,
    Mutation::LetGoOneMore,
    Mutation::AnyLinkLost,
    Mutation::FailedIsDead,
    Mutation::ResumeAtEnd,
    Mutation::DeadStayInFamilies,
    Mutation::RedialForEver,
    Mutation::AncestorForgets,
    Mutation::OneDeadLinkIsEnough,
    Mutation::SlowIsStuck,
    Mutation::RemoveAtOnce,
    Mutation::BlameAtOnce,
    Mutation::BlameTheWitness,
];

/// Whether this bug is planted.
#[cfg(not(test))]
#[inline]
pub const fn is_planted(_: Mutation) -> bool {
    false
}

#[cfg(test)]
pub use planting::{is_planted, plant};

#[cfg(test)]
mod planting {
    use super::Mutation;
    use std::cell::Cell;

    thread_local! {
        static PLANTED: Cell<Option<Mutation>> = const { Cell::new(None) };
    }

    /// Plants a bug in everything that this thread runs from now on, or none.
    pub fn plant(mutation: Option<Mutation>) {
        PLANTED.set(mutation);
    }

    /// Whether this bug is planted.
    pub fn is_planted(mutation: Mutation) -> bool {
        PLANTED.get() == Some(mutation)
    }
}
