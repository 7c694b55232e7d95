# awk -f conf.awk WANTED Kconfig: the .config that results
FILENAME == ARGV[1] { at = index($0, "="); wanted[substr($0, 1, at - 1)] = substr($0, at + 1); next }
/^config / { name = "CONFIG_" $2; order[++count] = name }
/depends on/ { needs[name] = "CONFIG_" $3 }
END {
	for (i = 1; i <= count; i++) {
		name = order[i]
		if (!(name in wanted) || wanted[name] == "n" || (name in needs && wanted[needs[name]] != "y"))
			print "# " name " is not set"
		else
			print name "=" wanted[name]
	}
}
