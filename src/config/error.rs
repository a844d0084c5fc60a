//! What is wrong with a file: every problem with its line, its column, the line itself, a caret and a hint.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One mistake of the operator's, ready to print.
#[derive(Clone, Debug)]
pub struct Problem {
    file: PathBuf,
    place: Option<Place>,
    message: String,
    hint: Option<String>,
}

/// Everything that is wrong; never empty.
#[derive(Clone, Debug)]
pub struct ConfigError {
    problems: Vec<Problem>,
}

/// Gathers the problems of one file, so that all are told at once.
#[derive(Debug)]
pub struct Problems<'t> {
    file: &'t Path,
    text: &'t str,
    list: Vec<Problem>,
}

#[derive(Clone, Debug)]
struct Place {
    line: usize,
    column: usize,
    text: String,
    width: usize,
}

impl<'t> Problems<'t> {
    pub fn in_file(file: &'t Path, text: &'t str) -> Self {
        Self { file, text, list: Vec::new() }
    }

    /// `at`: bytes of the file, as `toml::Spanned::span` gives them; `0..0` means a default, and shows no line.
    pub fn add(&mut self, at: Range<usize>, message: impl Into<String>) -> &mut Problem {
        let place = (at != (0..0)).then(|| Place::of(self.text, &at));
        self.list.push(Problem { file: self.file.to_owned(), place, message: message.into(), hint: None });
        self.list.last_mut().expect("just pushed")
    }

    /// What another file that this one names has wrong with it.
    pub fn include(&mut self, other: ConfigError) {
        self.list.extend(other.problems);
    }

    /// `value`, when nothing is wrong.
    pub fn into_result<T>(mut self, value: T) -> Result<T, ConfigError> {
        if self.list.is_empty() {
            return Ok(value);
        }
        self.list.sort_by_key(|problem| problem.place.as_ref().map_or(0, |place| place.line));
        Err(ConfigError { problems: self.list })
    }
}

impl Problem {
    /// The next move.
    pub fn hint(&mut self, hint: impl Into<String>) {
        self.hint = Some(hint.into());
    }
}

impl ConfigError {
    /// A file that could not even be read.
    pub fn unreadable(file: &Path, error: &std::io::Error) -> Self {
        let message = format!("cannot be read: {error}");
        Self { problems: vec![Problem { file: file.to_owned(), place: None, message, hint: None }] }
    }
}

impl Place {
    fn of(text: &str, at: &Range<usize>) -> Self {
        let start = text.floor_char_boundary(at.start.min(text.len()));
        let end = text.floor_char_boundary(at.end.clamp(start, text.len()));
        let line_start = text[..start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[start..].find('\n').map_or(text.len(), |newline| start + newline);
        Self {
            line: text[..start].matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            text: text[line_start..line_end].to_owned(),
            width: text[start..end.min(line_end).max(start)].chars().count().max(1),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = self.file.display();
        let Some(Place { line, column, text, width }) = &self.place else {
            write!(f, "error: {file}: {}", self.message)?;
            return self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n  hint: {hint}"));
        };
        let gutter = " ".repeat(line.to_string().len());
        writeln!(f, "error: {file}:{line}:{column}: {}", self.message)?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{line} | {text}")?;
        write!(f, "{gutter} | {}{}", " ".repeat(column - 1), "^".repeat(*width))?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "\n{gutter} hint: {hint}"))
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.problems.iter().enumerate() {
            if 0 < index {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigError {}
