# shellcheck shell=bash
# Sourced by the launchers: their flags, their errors, and dry runs.
# macOS still has Bash 3.2, which must understand this and each launcher for a user's own computer.

fail() {
  echo "error: $*" >&2
  exit 2
}

# The comment a launcher begins with is its help.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# parse_flags VALUES SWITCHES ARGUMENTS...: a --NAME=VALUE of the launcher sets the variable NAME, a
# switch --NAME sets it to yes, and what belongs to eru_jax.train goes to the array train. What is
# local here begins with _, so that a flag may have any other name.
parse_flags() {
  local _values=" $1 " _switches=" $2 dry_run " _argument _flag
  shift 2
  # shellcheck disable=SC2034  # the launchers read them
  train=() pass=() dry_run='' config='' workdir=''
  for _argument in "$@"; do
    _flag=${_argument%%=*}
    _flag=${_flag#--}
    case $_argument in
      --help | -h)
        usage
        exit 0
        ;;
      --pass=*) pass+=("${_argument#*=}") ;;
      --config.*=*) train+=("$_argument") ;;
      --config=* | --workdir=*)
        train+=("$_argument")
        printf -v "$_flag" '%s' "${_argument#*=}"
        ;;
      --*=*)
        [[ $_values == *" $_flag "* ]] || fail "there is no flag --$_flag; see --help"
        printf -v "$_flag" '%s' "${_argument#*=}"
        ;;
      --*)
        if [[ " config workdir pass $_values" == *" $_flag "* || $_flag == config.* ]]; then
          fail "write --$_flag=VALUE, with an equals sign"
        fi
        [[ $_switches == *" $_flag "* ]] || fail "there is no flag --$_flag; see --help"
        printf -v "$_flag" yes
        ;;
      *) fail "unexpected argument '$_argument'; every option is a --flag, see --help" ;;
    esac
  done
}

# require_flags NAME...: fails unless each has a value.
require_flags() {
  local _flag
  for _flag in "$@"; do
    [ -n "${!_flag}" ] || fail "--$_flag must be given; see --help"
  done
}

# A run needs a config that is there, and a place; both are among the training command's flags.
require_run() {
  require_flags config workdir
  [ -f "${config%%:*}" ] || fail "${config%%:*} does not exist; --config names a file of this clone"
}

require_number() {
  local _flag
  for _flag in "$@"; do
    [[ ${!_flag} =~ ^[1-9][0-9]*$ ]] ||
      fail "--$_flag must be a whole number from 1, not '${!_flag}'"
  done
}

# seconds_of TIME: a time limit as Slurm writes it (minutes, minutes:seconds, hours:minutes:seconds,
# days-hours, days-hours:minutes or days-hours:minutes:seconds) in seconds; fails on anything else.
seconds_of() {
  local _days=0 _rest=$1 _parts
  [[ $_rest =~ ^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$ ]] || return 1
  if [[ $_rest == *-* ]]; then
    _days=${_rest%%-*}
    _rest=${_rest#*-}
    IFS=: read -r -a _parts <<<"$_rest:0:0"
  else
    case $_rest in
      *:*:*) ;;
      *:*) _rest=0:$_rest ;;
      *) _rest=0:$_rest:0 ;;
    esac
    IFS=: read -r -a _parts <<<"$_rest"
  fi
  # Base 10: a leading zero would make them octal.
  echo $((10#$_days * 86400 + 10#${_parts[0]} * 3600 + 10#${_parts[1]} * 60 + 10#${_parts[2]}))
}

# A dry run needs no tool.
require_tool() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || fail "$1 is not installed here: $2"
}

# The words, each as a shell must be given it, in one line that can be pasted.
quote() {
  local word line=''
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*)
        line="$line'"
        while [ "$word" != "${word#*\'}" ]; do
          line="$line${word%%\'*}'\\''"
          word=${word#*\'}
        done
        line="$line$word' "
        ;;
      *) line="$line$word " ;;
    esac
  done
  printf '%s' "${line% }"
}

# Runs a command, or prints it if this is a dry run.
run() {
  if [ -n "$dry_run" ]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# Sources a set of compiler flags: use_flags v5e; '' is none.
use_flags() {
  [ -z "$1" ] && return
  check_flags "$1"
  # shellcheck source=/dev/null
  source "launch/flags/$1.sh"
}

check_flags() {
  [ -z "$1" ] && return
  local known
  known=$(cd launch/flags && printf '%s, ' *.sh)
  known=${known%, }
  [ -f "launch/flags/$1.sh" ] || fail "there are no flags '$1'; there are ${known//.sh/}"
}

# What a machine needs of this clone to install and train.
payload() {
  echo LICENSE README.md pyproject.toml requirements.txt setup.cfg configs eru_jax launch
}
