//! Does the rule hold in every order of things?
