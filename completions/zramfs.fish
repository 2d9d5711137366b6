# SPDX-License-Identifier: Apache-2.0
# fish completion for zramfs. The command itself says what fits, in click's protocol for fish.
function __zramfs_complete
    set -l words (commandline -cp)
    set -l word (commandline -ct)
    for line in (env _ZRAMFS_COMPLETE=fish_complete COMP_WORDS="$words" COMP_CWORD="$word" zramfs 2>/dev/null)
        set -l answer (string split -m 1 , -- $line)
        switch $answer[1]
            case dir
                __fish_complete_directories $word
            case file
                __fish_complete_path $word
            case plain
                echo $answer[2]
        end
    end
end
complete -c zramfs -f -a '(__zramfs_complete)'
