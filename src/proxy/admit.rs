//! May this request pass? A route's demand meets what is known of the user; the only place that decides.

use std::sync::Arc;

use crate::config::model::Access;
use crate::identity::Known;

use super::reply::Rejection;

/// What is known of who asks.
#[derive(Debug)]
pub enum Who {
    /// The route is public: nobody looked.
    Unasked,
    /// No session that counts: none, one that cannot be read, or its user is removed or disabled.
    Nobody,
    User(Arc<Known>),
    /// The store could not say.
    Unknown,
    /// The store was not asked, for this network has asked for too many sessions that do not exist.
    Guesser,
    /// A user name and a password that are not right.
    Impostor,
}

/// What happens to the request next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// To a backend, with what it may know.
    Forward(Option<Arc<Known>>),
    Reply(Rejection),
}

/// `groups` are those of the route: the user must be in one, unless there are none. `is_enough`: the login is as strong
/// and as recent as the route demands.
pub fn admit(access: Access, groups: &[String], who: Who, is_enough: bool) -> Step {
    match (access, who) {
        (Access::Public, _) => Step::Forward(None),
        // Serving a user as a stranger would be a logout in all but name (invariant 4).
        (Access::Optional | Access::Required, Who::Unknown) => Step::Reply(Rejection::StoreUnavailable),
        (Access::Optional | Access::Required, Who::Guesser) => Step::Reply(Rejection::TooManyGuesses),
        // A script that names a user is not to go on as a stranger without a word.
        (Access::Optional | Access::Required, Who::Impostor) => Step::Reply(Rejection::BadCredentials),
        (Access::Optional | Access::Required, Who::User(_)) if !is_enough => Step::Reply(Rejection::StepUp),
        (Access::Optional, Who::User(identity)) => Step::Forward(Some(identity)),
        (Access::Optional, Who::Nobody | Who::Unasked) => Step::Forward(None),
        (Access::Required, Who::Nobody | Who::Unasked) => Step::Reply(Rejection::Unauthenticated),
        (Access::Required, Who::User(identity)) => {
            if groups.is_empty() || identity.groups.iter().any(|group| groups.contains(group)) {
                Step::Forward(Some(identity))
            } else {
                Step::Reply(Rejection::MissingGroup)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::Identity;

    #[test]
    fn every_demand_meets_every_user() {
        let ann = Identity { user: "ann".into(), groups: vec!["staff".into()], ..Identity::default() };
        let ann = Arc::new(Known::new(ann));
        let staff = ["admins".to_owned(), "staff".to_owned()];
        let admins = ["admins".to_owned(), "Staff".to_owned()];
        let user = || Who::User(Arc::clone(&ann));
        let forward = |known: bool| Step::Forward(known.then(|| Arc::clone(&ann)));
        let cases = [
            (Access::Public, &[][..], Who::Unasked, forward(false)),
            (Access::Public, &[], user(), forward(false)),
            (Access::Public, &[], Who::Unknown, forward(false)),
            (Access::Public, &[], Who::Guesser, forward(false)),
            (Access::Optional, &[], Who::Guesser, Step::Reply(Rejection::TooManyGuesses)),
            (Access::Required, &[], Who::Guesser, Step::Reply(Rejection::TooManyGuesses)),
            (Access::Public, &[], Who::Impostor, forward(false)),
            (Access::Optional, &[], Who::Impostor, Step::Reply(Rejection::BadCredentials)),
            (Access::Required, &[], Who::Impostor, Step::Reply(Rejection::BadCredentials)),
            (Access::Optional, &[], Who::Nobody, forward(false)),
            (Access::Optional, &[], user(), forward(true)),
            (Access::Optional, &[], Who::Unknown, Step::Reply(Rejection::StoreUnavailable)),
            (Access::Required, &[], Who::Nobody, Step::Reply(Rejection::Unauthenticated)),
            (Access::Required, &[], Who::Unasked, Step::Reply(Rejection::Unauthenticated)),
            (Access::Required, &[], Who::Unknown, Step::Reply(Rejection::StoreUnavailable)),
            (Access::Required, &[], user(), forward(true)),
            (Access::Required, &staff, user(), forward(true)),
            (Access::Required, &admins, user(), Step::Reply(Rejection::MissingGroup)),
            (Access::Required, &admins, Who::Nobody, Step::Reply(Rejection::Unauthenticated)),
            (Access::Required, &admins, Who::Unknown, Step::Reply(Rejection::StoreUnavailable)),
        ];
        for (access, groups, who, expected) in cases {
            let case = format!("{access:?} {groups:?} {who:?}");
            assert_eq!(admit(access, groups, who, true), expected, "{case}");
        }
        for access in [Access::Optional, Access::Required] {
            assert_eq!(admit(access, &[], user(), false), Step::Reply(Rejection::StepUp), "{access:?}");
        }
        assert_eq!(admit(Access::Public, &[], Who::Unasked, false), forward(false), "nobody looked");
    }
}
