//! Which header names do backends know already? The sets that applications were written for, word for word.

use crate::config::model;

/// What one header of a preset carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    User,
    Name,
    Email,
    Groups,
}

/// A set of headers that belongs together.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// As applications document them; they go out in lower case, about which no backend should care.
    pub headers: &'static [(&'static str, Field)],
    pub groups: GroupList,
}

/// How several groups become one value.
#[derive(Clone, Copy, Debug)]
pub struct GroupList {
    pub separator: char,
    /// Each group in double quotes.
    pub quoted: bool,
}

/// All of them: whichever is in use, the names of the others are kept from clients too, because a backend may have
/// been set up for one of those before.
pub const ALL: [model::Preset; 8] = [
    model::Preset::None,
    model::Preset::XForwarded,
    model::Preset::Remote,
    model::Preset::XAuthRequest,
    model::Preset::Webseal,
    model::Preset::OidcClaim,
    model::Preset::Authentik,
    model::Preset::Webauth,
];

/// The headers behind the name.
pub fn preset(name: model::Preset) -> Preset {
    let comma = GroupList { separator: ',', quoted: false };
    let (headers, groups): (&[(&str, Field)], GroupList) = match name {
        model::Preset::None => (&[], comma),
        // oauth2-proxy in front of an application. Its user is an account name, and so are both of these here.
        model::Preset::XForwarded => (
            &[
                ("X-Forwarded-User", Field::User),
                ("X-Forwarded-Preferred-Username", Field::User),
                ("X-Forwarded-Email", Field::Email),
                ("X-Forwarded-Groups", Field::Groups),
            ],
            comma,
        ),
        // Authelia, tinyauth.
        model::Preset::Remote => (
            &[
                ("Remote-User", Field::User),
                ("Remote-Name", Field::Name),
                ("Remote-Email", Field::Email),
                ("Remote-Groups", Field::Groups),
            ],
            comma,
        ),
        // oauth2-proxy behind nginx's auth_request.
        model::Preset::XAuthRequest => (
            &[
                ("X-Auth-Request-User", Field::User),
                ("X-Auth-Request-Preferred-Username", Field::User),
                ("X-Auth-Request-Email", Field::Email),
                ("X-Auth-Request-Groups", Field::Groups),
            ],
            comma,
        ),
        model::Preset::Webseal => {
            (&[("iv-user", Field::User), ("iv-groups", Field::Groups)], GroupList { separator: ',', quoted: true })
        }
        // mod_auth_openidc: the prefix, then the claim as OpenID Connect spells it.
        model::Preset::OidcClaim => (
            &[
                ("OIDC_CLAIM_sub", Field::User),
                ("OIDC_CLAIM_preferred_username", Field::User),
                ("OIDC_CLAIM_name", Field::Name),
                ("OIDC_CLAIM_email", Field::Email),
                ("OIDC_CLAIM_groups", Field::Groups),
            ],
            comma,
        ),
        model::Preset::Authentik => (
            &[
                ("X-authentik-username", Field::User),
                ("X-authentik-name", Field::Name),
                ("X-authentik-email", Field::Email),
                ("X-authentik-groups", Field::Groups),
            ],
            GroupList { separator: '|', quoted: false },
        ),
        // Grafana, Gitea; these two call the name differently.
        model::Preset::Webauth => (
            &[
                ("X-WEBAUTH-USER", Field::User),
                ("X-WEBAUTH-NAME", Field::Name),
                ("X-WEBAUTH-FULLNAME", Field::Name),
                ("X-WEBAUTH-EMAIL", Field::Email),
                ("X-WEBAUTH-GROUPS", Field::Groups),
            ],
            comma,
        ),
    };
    Preset { headers, groups }
}
